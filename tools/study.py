"""Run a study and write its table and figure.

python tools/study.py s2 [seeds=10] [steps=300] [out=runs/s2] [docs=FOLDER]
                          [train=false]

s2: the planted bandit, all worlds, systems and prices (docs/studies/s2.md). Each finished cell is a
line of OUT/cells.jsonl, and a second start continues there; train=false only reads them. The tables
and the figure go to FOLDER, without it to OUT; docs/studies is where they are published.
`seeds=2 steps=20` takes about a minute.

s4: SmolLM2 on Anthropic HH, for a GPU; its options are in tools/studies/s4.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.problems import fail
from tools.studies import s2

STUDIES = {"s2": s2.main}
LEAST = {"seeds": 2, "steps": 1}  # an interval over seeds needs two


@dataclass(frozen=True)
class Options:
    study: str
    seeds: int = 10
    steps: int = 300
    out: Path | None = None
    docs: Path | None = None
    train: bool = True


def parse(argv: Sequence[str]) -> Options:
    """Raises UserError for an unknown study or option, and for a number that is not one."""
    if not argv or argv[0] not in STUDIES:
        raise UserError(
            f"no study {argv[0]!r}" if argv else "no study is named",
            where="command line",
            fix=f"python tools/study.py {'|'.join(STUDIES)}|s4 [seeds=10] [steps=300]",
        )
    found: dict[str, Any] = {}
    for word in argv[1:]:
        key, _, text = word.partition("=")
        if key in LEAST and text.isdigit() and int(text) >= LEAST[key]:
            found[key] = int(text)
        elif key in ("out", "docs") and text:
            found[key] = Path(text)
        elif key == "train" and text in ("true", "false"):
            found[key] = text == "true"
        else:
            raise UserError(
                f"cannot use {word!r}",
                where="command line",
                fix="seeds=N (2 or more), steps=N, out=FOLDER, docs=FOLDER, train=true|false",
            )
    return Options(argv[0], **found)


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["s4"]:  # it has models, and options, of its own
        from tools.studies import s4

        s4.main(argv[1:])
        return
    options = parse(argv)
    out = options.out or Path("runs") / options.study
    run = STUDIES[options.study]
    run(options.seeds, options.steps, options.train, out, options.docs or out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
