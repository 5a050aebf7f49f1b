"""What is wrong with a recipe: every problem at once, each with its key, its file and what was
probably meant."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from gipo_megatron.errors import UserError

SHOWN = 16  # names in a list, problems in a message: one screen


@dataclass(frozen=True)
class Problem:
    key: str  # dotted; empty when the problem is a whole file or the command line
    what: str
    where: str = ""  # file:line or "command line"
    fix: str = ""
    # False: the value is absent or points at nothing, which is no problem for what nobody reads
    known: bool = True

    def __str__(self) -> str:
        lines = [f"{self.key}: {self.what}" if self.key else self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class RecipeErrors(UserError):
    """All problems of one recipe."""

    def __init__(self, recipe: str, problems: Sequence[Problem]) -> None:
        self.recipe, self.problems = recipe, tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{recipe}: {count}")

    def __str__(self) -> str:
        more = [f"and {len(self.problems) - SHOWN} more"] if len(self.problems) > SHOWN else []
        return "\n".join([self.what, *(str(p) for p in self.problems[:SHOWN]), *more])


def suggest(word: str, options: Iterable[str]) -> str:
    """`did you mean X?`, or what there is."""
    known = sorted(set(options))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    shown = ", ".join(known[:SHOWN]) + (
        f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    )
    return f"known here: {shown}" if known else ""


def fail(error: UserError, patience: float = 30.0) -> NoReturn:
    """Print `error` once and leave with exit code 2; under torchrun rank 0 prints and every rank
    exits 2.

    torchrun ends all ranks as soon as one is gone, so the others give rank 0 up to `patience`
    seconds to be the first, and to be gone. Who is still there then knows what rank 0, busy or
    waiting, does not, and says it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(patience)
    print(f"rank {rank}: {error}" if rank else error, file=sys.stderr, flush=True)
    raise SystemExit(2)
