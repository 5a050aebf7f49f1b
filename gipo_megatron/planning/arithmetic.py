"""Batch arithmetic: rows of replicas, of micro-batches and of optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from gipo_megatron.components.rollout import VLLMRollout
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.specs import Sampling

BATCH, PROBE, DATASET = "batch", "probe", "dataset"


@dataclass(frozen=True)
class Call:
    """One call of a role, or several of the same name added up. Counts are of all replicas."""

    name: str  # as a plan prints it
    verb: str  # build | generate | forward | update | save
    role: str
    rows: int = 0  # sequences or pairs
    sequences: int = 0  # of the rows; a pair has two
    count: int = 1
    sampling: Sampling | None = None  # of `generate`
    server: VLLMRollout | None = None  # of `generate`: not the role's own decoder, but a server
    reads: str = BATCH  # the iteration's batch, the probe, or the whole dataset

    def __add__(self, other: Call) -> Call:
        return replace(
            self,
            rows=self.rows + other.rows,
            sequences=self.sequences + other.sequences,
            count=self.count + other.count,
        )


def added_up(items: Iterable[Any]) -> list[Any]:
    """Add up items (calls, or their phases) of the same name; keep the order of the first ones."""
    found: dict[str, Any] = {}
    for item in items:
        found[item.name] = found[item.name] + item if item.name in found else item
    return list(found.values())


@dataclass(frozen=True)
class Iteration:
    """The calls of a recipe's algorithm, in order, and how their rows are cut."""

    recipe: Recipe
    built: tuple[str, ...]  # roles
    once: tuple[Call, ...]  # before the first iteration, by roles that are freed afterwards
    calls: tuple[Call, ...]  # of one iteration

    @property
    def generates(self) -> bool:
        return any(call.verb == "generate" for call in self.calls)

    @property
    def rows(self) -> int:
        batch = self.recipe.batch
        return batch.prompts * batch.responses if self.generates else batch.minibatch

    @property
    def rows_per_replica(self) -> int:
        return self.rows // self.recipe.data_parallel

    @property
    def sequences_per_row(self) -> int:
        """2 for pairs."""
        return self.calls[0].sequences // self.calls[0].rows

    @property
    def rows_per_slot(self) -> int:
        """Return the rows of one micro-batch, each of them as long as data.max_length allows."""
        batch = self.recipe.batch
        if batch.micro_batch is not None:
            return batch.micro_batch
        assert batch.micro_tokens is not None, "the recipe check requires one of the two"
        return batch.micro_tokens // (self.sequences_per_row * self.recipe.data.max_length)

    def slots(self, rows: int) -> int:
        """Return the micro-batches of `rows` rows on one replica."""
        return -(-rows // (self.recipe.data_parallel * self.rows_per_slot))

    def slots_of(self, call: Call) -> int:
        """Return the micro-batches of one of the calls that are added up in `call`."""
        return self.slots(call.rows // call.count)

    def tokens(self, call: Call) -> int:
        """Return an upper bound: every sequence is as long as data.max_length allows."""
        return call.sequences * self.recipe.data.max_length

    def lines(self) -> list[str]:
        """Return the arithmetic in words."""
        batch, replicas = self.recipe.batch, self.recipe.data_parallel
        noun = "pairs" if self.sequences_per_row == 2 else "sequences"
        shares = f"{replicas} replica{'s' if replicas > 1 else ''}"
        slots = self.slots(batch.minibatch)
        found = [
            f"{self.rows} {noun} / {shares} = {self.rows_per_replica} each, of at most"
            f" {self.recipe.data.max_length} tokens",
            f"{batch.minibatch} {noun} an optimizer step = {shares} × {slots}"
            f" micro-batch{'es' if slots > 1 else ''} of {batch.micro}",
        ]
        if self.generates:
            generated = f"{batch.prompts} prompts × {batch.responses} responses"
            found.insert(0, f"{generated} = {self.rows} sequences an iteration")
        updates = added_up(call for call in self.calls if call.verb == "update")
        steps = {call.role: f"{self._steps(call.count)} an iteration" for call in updates}
        if len(set(steps.values())) == 1:
            return [*found, f"{steps[updates[0].role]}, of each model that is trained"]
        return [*found, *(f"{role}: {text}" for role, text in steps.items())]

    def _steps(self, count: int) -> str:
        minibatch = self.recipe.batch.minibatch
        noun = f"{count} optimizer step{'s' if count > 1 else ''}"
        epochs, rest = divmod(count * minibatch, self.rows)
        if rest:
            return noun
        times = f"{epochs} epochs × " if epochs > 1 else ""
        return f"{times}{self.rows} / {minibatch} = {noun}"
