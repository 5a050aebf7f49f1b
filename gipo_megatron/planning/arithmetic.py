"""How many rows of a batch go where: replicas, micro-batches, optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gipo_megatron.planning.counting import Call, Iteration, added_up
from gipo_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class BatchPlan:
    """The batch of one iteration. A row is a sequence or a pair."""

    replicas: int
    rows: int  # of all replicas
    sequences_per_row: int  # a pair has two
    minibatch: int  # rows of one optimizer step
    micro_batch: int  # rows of one forward pass on one replica
    updates: Mapping[str, int]  # role -> optimizer steps
    prompts: int | None  # None: nothing is generated
    max_length: int

    def slots(self, rows: int) -> int:
        """Micro-batches of `rows` rows on one replica."""
        return -(-rows // (self.replicas * self.micro_batch))

    def slots_of(self, call: Call) -> int:
        """Micro-batches of one of the calls that are added up in `call`."""
        return self.slots(call.rows // call.count)

    def tokens(self, call: Call) -> int:
        """Upper bound: every sequence is as long as data.max_length allows."""
        return call.sequences * self.max_length

    @property
    def rows_per_replica(self) -> int:
        return self.rows // self.replicas

    def lines(self) -> list[str]:
        noun = "pairs" if self.sequences_per_row == 2 else "sequences"
        replicas = f"{self.replicas} replica{'s' if self.replicas > 1 else ''}"
        slots = self.slots(self.minibatch)
        found = [
            f"{self.rows} {noun} / {replicas} = {self.rows_per_replica} each, of at most"
            f" {self.max_length} tokens",
            f"{self.minibatch} {noun} an optimizer step = {replicas} × {slots}"
            f" micro-batch{'es' if slots > 1 else ''} of {self.micro_batch}",
        ]
        if self.prompts is not None:
            generated = f"{self.prompts} prompts × {self.rows // self.prompts} responses"
            found.insert(0, f"{generated} = {self.rows} sequences an iteration")
        if len(set(self.updates.values())) == 1:
            (steps,) = set(self.updates.values())
            return [*found, f"{self._steps(steps)} an iteration, of each model that is trained"]
        each = [
            f"{role}: {self._steps(steps)} an iteration" for role, steps in self.updates.items()
        ]
        return [*found, *each]

    def _steps(self, count: int) -> str:
        noun = f"{count} optimizer step{'s' if count > 1 else ''}"
        epochs, rest = divmod(count * self.minibatch, self.rows)
        if rest:
            return noun
        times = f"{epochs} epochs × " if epochs > 1 else ""
        return f"{times}{self.rows} / {self.minibatch} = {noun}"


def batch_plan(recipe: Recipe, iteration: Iteration) -> BatchPlan:
    batch, first = recipe.batch, iteration.calls[0]
    rollout = any(call.verb == "generate" for call in iteration.calls)
    updates = added_up(call for call in iteration.calls if call.verb == "update")
    return BatchPlan(
        replicas=recipe.data_parallel,
        rows=batch.prompts * batch.responses if rollout else batch.minibatch,
        sequences_per_row=first.sequences // first.rows,
        minibatch=batch.minibatch,
        micro_batch=batch.micro_batch,
        updates={call.role: call.count for call in updates},
        prompts=batch.prompts if rollout else None,
        max_length=recipe.data.max_length,
    )
