"""Run a study and write its table and figure.

python tools/study.py s2 [seeds=10] [steps=300] [out=runs/s2] [docs=FOLDER]

s2: the planted bandit, all worlds, systems and prices (docs/studies/s2.md). Each finished cell is a
line of OUT/cells.jsonl, and a second start continues there. The table and the figure go to FOLDER;
without it to OUT. docs/studies is where they are published. `seeds=2 steps=20` takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.problems import fail
from tools.studies import s2

STUDIES = {"s2": s2.main}


@dataclass(frozen=True)
class Options:
    study: str
    seeds: int = 10
    steps: int = 300
    out: Path | None = None
    docs: Path | None = None


def parse(argv: Sequence[str]) -> Options:
    """Raises UserError for an unknown study or option, and for a number that is not one."""
    if not argv or argv[0] not in STUDIES:
        raise UserError(
            f"no study {argv[0]!r}" if argv else "no study is named",
            where="command line",
            fix=f"python tools/study.py {'|'.join(STUDIES)} [seeds=10] [steps=300]",
        )
    found: dict[str, int | Path] = {}
    for word in argv[1:]:
        key, _, text = word.partition("=")
        if key in ("seeds", "steps") and text.isdigit() and int(text) > 0:
            found[key] = int(text)
        elif key in ("out", "docs") and text:
            found[key] = Path(text)
        else:
            raise UserError(
                f"cannot use {word!r}",
                where="command line",
                fix="seeds=N, steps=N (whole numbers above 0), out=FOLDER or docs=FOLDER",
            )
    return Options(argv[0], **found)  # type: ignore[arg-type]


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    out = options.out or Path("runs") / options.study
    STUDIES[options.study](options.seeds, options.steps, out, options.docs or out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
