"""The command `gipo train`; `gipo train --help` explains it."""

import sys

from gipo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
