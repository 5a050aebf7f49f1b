"""Damaged inputs in place of a user's: each ends with exit code 0 or 2 and one screen that names
the file or the key, without a traceback, a hang or a file that is half written.

python tools/fuzz.py [--seed 0] [--only SUBJECT …] [--inputs N]

1,500 inputs, drawn by hypothesis: recipes, data files of each reader, a model's config.json and
tokenizer, answers of judges, metadata of checkpoints, run folders. All in this process, in a
temporary folder. Prints a line for each subject, and each fault with the shortest input that shows
it; tests/fuzz keeps those.

Exit code 0: no fault; 1: a fault; 2: a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_megatron.cli import run
from tools.fuzzing.subjects import SUBJECTS, fuzz, lines


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fuzz.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    parser.add_argument("--inputs", type=int, default=0, help="of each subject")
    words = parser.parse_args(argv)
    inputs = faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in words.only:
            start = time.process_time()
            count = words.inputs or SUBJECTS[name].count
            found = fuzz(name, count, words.seed, Path(folder) / "here")
            seconds = time.process_time() - start
            print(f"{name}: {found.inputs} inputs, {len(found.faults)} faults, {seconds:.0f} s")
            print(*lines(found), sep="\n", end="\n" if found.faults else "", flush=True)
            inputs, faults = inputs + found.inputs, faults + len(found.faults)
    print(f"{inputs} inputs, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
