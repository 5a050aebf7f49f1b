"""The common form of every row: a prompt in turns and zero, one or two responses. Also the count of
rows that were dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REASONS, SHOWN = 6, 160  # reasons and letters of a row in an error
KINDS = {"prompt": 0, "sft": 1, "preference": 2}  # kind -> responses a row needs
# reasons to drop a row with which no text is lost
DUPLICATE, SEEN = "duplicate row", "prompt seen before"


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
    """Rows kept, dropped and changed, by reason, with the first place and row of each reason. Also
    the rows of each file and the side they are on, and the names of files and columns not read."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    files: Counter[tuple[str, str]] = field(default_factory=Counter)  # (file, side) -> rows
    part: str = ""  # how many of the kept rows are in the part that is trained on
    unread_files: tuple[str, ...] = ()
    unread_columns: dict[str, None] = field(default_factory=dict)  # an ordered set

    @property
    def read(self) -> int:
        return self.kept + sum(self.dropped.values())

    @property
    def lost(self) -> int:
        return sum(self.dropped.values()) - self.dropped[DUPLICATE] - self.dropped[SEEN]

    def drop(self, reason: str, where: str, row: object = "") -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)
        if reason not in self.shown:
            text = repr(row)
            self.shown[reason] = text if len(text) <= SHOWN else f"{text[:SHOWN]} …"

    def change(self, reason: str, where: str) -> None:
        self.changed[reason] += 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[str]:
        """Return `kept K of N rows`, the part of them, then one line per reason."""
        lines = [f"kept {self.kept} of {self.read} rows"]
        if self.part:
            lines.append(self.part)
        for verb, counts in (("dropped", self.dropped), ("changed", self.changed)):
            for reason, count in sorted(counts.items()):
                lines.append(f"{verb} {count}: {reason} (first: {self.first[reason]})")
        return lines

    def origins(self) -> list[str]:
        """Return a line for each file that was read or was not, and one for columns not read."""
        return [
            *(f"read {file}: {rows} rows, {side}" for (file, side), rows in self.files.items()),
            *(f"not read: {file}" for file in self.unread_files),
            *self._columns(),
        ]

    def reasons(self) -> str:
        """Return the commonest reasons of drops, with one row of each, for an error."""
        lines = [
            f"dropped {count}: {reason}; {self.first[reason]}: {self.shown[reason]}"
            for reason, count in self.dropped.most_common(REASONS)
        ]
        return "\n         ".join([*lines, *self._columns()])

    def _columns(self) -> list[str]:
        return [f"not read: {', '.join(self.unread_columns)}"] if self.unread_columns else []
