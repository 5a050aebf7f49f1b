"""Run a study and write its tables and figure.

python tools/study.py s2 [seeds=10] [steps=300] [out=runs/s2] [docs=FOLDER] [train=false]
python tools/study.py s3 [seeds=6] [steps=80] [out=runs/s3] [docs=FOLDER] [train=false] [workers=N]

s2: the planted bandit, all worlds, systems and prices (docs/studies/s2.md).
s3: the planted language world with the real trainer, N runs at once (docs/studies/s3.md).
s4: SmolLM2 on Anthropic HH, for a GPU (docs/studies/s4.md); its options are in studies/s4.py.

Each finished cell is a line of OUT/cells.jsonl, and a second start continues there; train=false
only reads them. The tables and the figure go to FOLDER, without it to OUT; docs/studies is where
they are published. `s2 seeds=2 steps=20` takes about a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_megatron.cli import run
from gipo_megatron.errors import UserError
from tools.studies import s2, s3
from tools.studies.options import Options

# study -> its command, default seeds, default steps
STUDIES: dict[str, tuple[Callable[[Options], None], int, int]] = {
    "s2": (s2.main, 10, 300),
    "s3": (s3.main, 6, 80),
}
LEAST = {"seeds": 2, "steps": 1, "workers": 1}  # an interval over seeds needs two


def parse(argv: Sequence[str]) -> Options:
    """Raises UserError for an unknown study or option, and for a number that is not one."""
    if not argv or argv[0] not in STUDIES:
        raise UserError(
            f"no study {argv[0]!r}" if argv else "no study is named",
            where="command line",
            fix=f"python tools/study.py {'|'.join(STUDIES)}|s4 [seeds=10] [steps=80]",
        )
    _, seeds, steps = STUDIES[argv[0]]
    out = Path("runs") / argv[0]
    found: dict[str, Any] = {"seeds": seeds, "steps": steps, "out": out}
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
                fix="seeds=N (2 or more), steps=N, out=FOLDER, docs=FOLDER, train=true|false,"
                " workers=N",
            )
    return Options(**{"docs": found["out"], **found})


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["s4"]:  # it has models, and options, of its own
        from tools.studies import s4

        s4.main(argv[1:])
        return
    options = parse(argv)
    try:
        STUDIES[argv[0]][0](options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command continues") from None


if __name__ == "__main__":
    sys.exit(run(partial(main, sys.argv[1:])))
