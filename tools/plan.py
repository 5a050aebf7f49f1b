"""The command `gipo plan`; `gipo plan --help` explains it."""

import sys

from gipo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
