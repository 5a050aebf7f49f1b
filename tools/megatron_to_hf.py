"""The command `gipo convert to-hf`; `gipo convert --help` explains it."""

import sys

from gipo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
