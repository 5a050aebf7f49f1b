"""Problems of a recipe: each with its key, its file and line, and how to fix it; all reported
together."""

from __future__ import annotations

import difflib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from gipo_megatron.environment import emit
from gipo_megatron.errors import UserError
from gipo_megatron.screen import shown

# names in a list, problems in a message, characters of them: one screen
SHOWN, CHARACTERS = 16, 4000


@dataclass(frozen=True)
class Problem:
    key: str  # dotted; empty when the problem is a whole file or the command line
    what: str
    where: str = ""  # file:line or "command line"
    fix: str = ""
    absent: bool = False  # the value is not set or cannot be read here; no typo, no wrong value

    def __str__(self) -> str:
        return str(
            UserError(
                f"{self.key}: {self.what}" if self.key else self.what,
                where=self.where,
                fix=self.fix,
            )
        )


class RecipeErrors(UserError):
    """All problems of one recipe."""

    def __init__(self, recipe: str, problems: Sequence[Problem]) -> None:
        self.recipe, self.problems = recipe, tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{recipe}: {count}")

    def __str__(self) -> str:
        texts = [str(problem) for problem in self.problems[:SHOWN]]
        while len(texts) > 1 and sum(map(len, texts)) > CHARACTERS:
            texts.pop()
        more = len(self.problems) - len(texts)
        return "\n".join([self.what, *texts, *([f"and {more} more"] if more else [])])


def suggest(word: str, options: Iterable[str]) -> str:
    """Return `did you mean X?`, or the known names where none is near."""
    known = sorted(set(options))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"known here: {', '.join(known[:SHOWN])}{more}" if known else ""


def fail(error: UserError, patience: float = 30.0) -> NoReturn:
    """Print `error` once and exit with code 2; under torchrun rank 0 prints and all ranks exit.

    torchrun ends all ranks as soon as one exits, so the other ranks wait up to `patience` seconds
    for rank 0. A rank that still runs afterwards has an error that rank 0 does not have, and
    prints it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(patience)
    emit(shown(f"rank {rank}: {error}" if rank else str(error)))
    raise SystemExit(2)
