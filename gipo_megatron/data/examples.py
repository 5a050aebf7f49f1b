"""What every source becomes: a prompt in turns, and no, one or two responses. And the count of what
was lost on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

KINDS = {"prompt": 0, "sft": 1, "preference": 2}  # kind -> responses a row needs


class Turn(NamedTuple):
    role: str  # system | user | assistant; text: a prompt that has no turns
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """One clean row. A transcript's turns keep their white space, so that joining them gives the
    file's text back."""

    style: str  # text | transcript | messages
    prompt: tuple[Turn, ...]
    responses: tuple[str, ...]  # () | (response,) | (chosen, rejected)
    source: str
    extras: dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used; its message is the reason it is counted under."""


@dataclass
class Tally:
    """Rows kept, dropped and changed, by reason; the first place of each reason is kept to show
    it."""

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
        """For the report: `kept K of N rows`, then one line a reason."""
        lines = [f"kept {self.kept} of {self.read} rows"]
        for verb, counts in (("dropped", self.dropped), ("changed", self.changed)):
            lines += [
                f"{verb} {count}: {reason} (first: {self.first[reason]})"
                for reason, count in sorted(counts.items())
            ]
        return lines
