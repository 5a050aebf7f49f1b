"""One trial of the campaign of faults, and what it is given."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Lost(Exception):
    """The fault that a trial did not survive, in one line."""


@dataclass
class Bench:
    """The place of one trial."""

    folder: Path  # empty at the start, removed after a survived trial
    base: Path  # made once per campaign (tools/faults/runs.py): trained weights, reference runs
    random: random.Random  # seeded by the campaign's seed, the line and the case


@dataclass(frozen=True)
class Trial:
    """A fault and the checks after it. `run` raises Lost; any other error counts as lost, too."""

    line: str  # the row of the table
    case: str  # unique in its line
    run: Callable[[Bench], None]
    small: bool = False  # also a part of `make test`
    known: str = ""  # why it is not survived; such a row is named, and does not fail the campaign


def expect(held: bool, what: str) -> None:
    """Raise Lost(`what`) unless `held`."""
    if not held:
        raise Lost(what)
