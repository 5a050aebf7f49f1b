"""The command `gipo doctor`; `gipo doctor --help` explains it."""

import sys

from gipo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
