"""The common form of every row: a prompt in turns and zero, one or two responses. Also the count of
rows that were dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

KINDS = {"prompt": 0, "sft": 1, "preference": 2}  # kind -> responses a row needs


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """Return how many items two sequences share from the start."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


class Turn(NamedTuple):
    role: str  # system | user | assistant; text: a prompt that has no turns
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """A clean row. The turns of a transcript keep their white space: joined, they are the file's
    text."""

    style: str  # text | transcript | messages
    prompt: tuple[Turn, ...]
    responses: tuple[str, ...]  # () | (response,) | (chosen, rejected)
    source: str
    extras: dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used. The message is the reason under which it is counted."""


@dataclass
class Tally:
    """Rows kept, dropped and changed, by reason, with the first place of each reason."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    @property
    def read(self) -> int:
        return self.kept + sum(self.dropped.values())

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def change(self, reason: str, where: str) -> None:
        self.changed[reason] += 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[str]:
        """Return `kept K of N rows`, then one line per reason."""
        lines = [f"kept {self.kept} of {self.read} rows"]
        for verb, counts in (("dropped", self.dropped), ("changed", self.changed)):
            for reason, count in sorted(counts.items()):
                lines.append(f"{verb} {count}: {reason} (first: {self.first[reason]})")
        return lines
