"""The command `gipo evaluate`; `gipo evaluate --help` explains it."""

import sys

from gipo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
