"""Damaged inputs, 50 a trial (tools/fuzz.py runs the same ones by themselves)."""

from __future__ import annotations

from functools import partial

from tools.faults.trial import Bench, Trial, expect
from tools.fuzzing.subjects import SUBJECTS, fuzz, lines

INPUTS = 50  # of a trial
SURVIVED = {
    f"fuzz: {name}": f"each of {min(INPUTS, subject.count)} damaged inputs a trial ends with code 0"
    " or 2 and one screen that names the place; nothing is half written"
    for name, subject in SUBJECTS.items()
}


def trials() -> list[Trial]:
    return [
        Trial(f"fuzz: {name}", f"inputs from {first}", partial(_run, name, count))
        for name, subject in SUBJECTS.items()
        for first in range(0, subject.count, INPUTS)
        for count in [min(INPUTS, subject.count - first)]
    ]


def _run(name: str, count: int, bench: Bench) -> None:
    found = fuzz(name, count, bench.random.getrandbits(32), bench.folder / "here")
    expect(not found.faults, "\n".join(lines(found)))
    expect(found.inputs >= count, f"only {found.inputs} of {count} inputs")
