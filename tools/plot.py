"""The command `gipo plot`; `gipo plot --help` explains it."""

import sys

from gipo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
