"""The command `gipo convert from-hf`; `gipo convert --help` explains it."""

import sys

from gipo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "from-hf", *sys.argv[1:]]))
