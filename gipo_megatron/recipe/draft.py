"""A recipe while it is checked. A check that reads a section with a problem ends there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gipo_megatron.data.config import DataConfig
from gipo_megatron.recipe.needs import Needs
from gipo_megatron.recipe.problems import Problem
from gipo_megatron.recipe.schema import Batch, Hardware, ModelConfig, ModelSpec, Run
from gipo_megatron.recipe.source import Block
from gipo_megatron.recipe.validate import is_wrong
from gipo_megatron.specs import Parallel, Precision


class Unsound(Exception):
    """A check reads a section that has a problem of its own."""


class Draft:
    """A recipe that is being checked: its typed sections as attributes."""

    models: dict[str, ModelConfig]
    model: ModelSpec
    parallel: Parallel
    precision: Precision
    batch: Batch
    algorithm: dict[str, Any]
    data: DataConfig
    run: Run
    hardware: Hardware

    def __init__(self, tree: Block, sections: dict[str, Any], needs: Needs, world: int) -> None:
        self.tree, self.sections, self.needs = tree, sections, needs
        self.world = world or default_world(sections["hardware"], sections["parallel"])

    def __getattr__(self, section: str) -> Any:
        """A section's value; raises Unsound where it has a problem."""
        value = self.sections[section]
        if is_wrong(value):
            raise Unsound(section)
        return value

    def problem(self, key: str, what: str, fix: str = "") -> Problem:
        return Problem(key, what, self.tree.origin_of(key), fix)

    def found(self, checks: Iterable[Check]) -> list[Problem]:
        """Return the problems of all checks; each ends where it reads an unsound section."""
        found: list[Problem] = []
        for check in checks:
            try:
                for problem in check(self):
                    found.append(problem)
            except Unsound:
                continue
        return found


Found = Iterator[Problem]
Check = Callable[[Draft], Found]


def default_world(hardware: Any, parallel: Any) -> int:
    """Return the processes that a recipe is written for; sections may be WRONG."""
    if isinstance(hardware, Hardware) and hardware.gpus:
        return hardware.gpus
    return parallel.model if isinstance(parallel, Parallel) else 1
