"""Subjects of fuzzing: their inputs, how one is run, and how many there are in a campaign."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tools.fuzzing import case, folders, judges, recipes, rows
from tools.fuzzing.case import Fault

Run = Callable[[Any, Path], Any]


@dataclass(frozen=True)
class Subject:
    """inputs: makes the strategy, after what it draws from was built."""

    count: int
    inputs: Callable[[], st.SearchStrategy[Any]]
    run: Run = case.run


def _recipes() -> st.SearchStrategy[Any]:
    recipes.shipped()
    return recipes.CASES


def _checkpoints() -> st.SearchStrategy[Any]:
    for kind in ("model", "adapters"):
        folders.checkpoint(kind)
    return folders.checkpoints()


SUBJECTS = {
    "recipes": Subject(500, _recipes),
    **{
        f"data rows, {reader}": Subject(100, functools.partial(rows.cases, reader))
        for reader in rows.READERS
    },
    "models' configurations": Subject(200, lambda: folders.models()),
    "judges' answers": Subject(200, judges.cases, judges.run),
    "checkpoints' metadata": Subject(80, _checkpoints),
    "run folders": Subject(20, lambda: folders.runs()),
}


@dataclass
class Outcome:
    """Number of inputs that were run, and {fault: the shortest input that shows it}."""

    inputs: int
    faults: dict[str, Any]


def fuzz(name: str, count: int, number: int, folder: Path) -> Outcome:
    """Run `count` inputs of a subject, drawn from the seed `number`, in `folder`."""
    subject, found = SUBJECTS[name], Outcome(0, {})

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(subject.inputs())
    def one(drawn: Any) -> None:
        found.inputs += 1
        try:
            subject.run(drawn, folder)
        except Fault as fault:
            kind = str(fault).split("\n")[0]
            if kind not in found.faults or len(repr(drawn)) < len(repr(found.faults[kind])):
                found.faults[kind] = drawn

    try:
        one()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def lines(found: Outcome) -> Iterator[str]:
    """Yield a fault and the input that shows it, in words."""
    for kind, drawn in found.faults.items():
        yield f"  {kind}"
        yield f"    {drawn!r}"[:3000]
