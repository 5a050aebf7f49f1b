"""From prompts to optimizer steps: how many rows of what go where."""

from __future__ import annotations

from dataclasses import dataclass

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.schema import Recipe

PLANNED = ("sft", "reward_model", "dpo", "ppo")
PAIRS = ("reward_model", "dpo")  # algorithms whose rows are pairs: two sequences each


@dataclass(frozen=True)
class BatchPlan:
    """Rows are sequences, or pairs; all counts of one iteration."""

    replicas: int
    rows: int  # of all replicas
    sequences_per_row: int
    minibatch: int  # rows of one optimizer step
    micro_batch: int  # rows of one forward pass on one replica
    epochs: int
    prompts: int | None  # None: nothing is generated
    responses: int
    max_length: int
    max_response: int

    @property
    def updates(self) -> int:
        """Optimizer steps of each trained model."""
        return self.epochs * self.rows // self.minibatch

    @property
    def slots(self) -> int:
        """Micro-batches of one optimizer step on one replica."""
        return self.minibatch // (self.replicas * self.micro_batch)

    @property
    def rows_per_replica(self) -> int:
        return self.rows // self.replicas

    @property
    def scoring_slots(self) -> int:
        """Micro-batches of one forward pass over a replica's rows."""
        return -(-self.rows_per_replica // self.micro_batch)

    @property
    def sequences(self) -> int:
        return self.rows * self.sequences_per_row

    @property
    def tokens(self) -> int:
        """At most: every sequence as long as data.max_length allows."""
        return self.sequences * self.max_length

    def lines(self) -> list[str]:
        noun = "pairs" if self.sequences_per_row == 2 else "sequences"
        replicas = f"{self.replicas} replica{'s' if self.replicas > 1 else ''}"
        slots = f"{self.slots} micro-batch{'es' if self.slots > 1 else ''}"
        found = []
        if self.prompts is not None:
            found.append(
                f"{self.prompts} prompts × {self.responses} responses = {self.rows} sequences an"
                " iteration"
            )
        found.append(
            f"{self.rows} {noun} / {replicas} = {self.rows_per_replica} each, of at most"
            f" {self.max_length} tokens"
        )
        found.append(
            f"{self.minibatch} {noun} an optimizer step = {replicas} × {slots} of"
            f" {self.micro_batch}"
        )
        epochs = "" if self.epochs == 1 else f"{self.epochs} epochs × "
        steps = (
            f"{epochs}{self.rows} / {self.minibatch} = {self.updates} optimizer"
            f" step{'s' if self.updates > 1 else ''}"
        )
        return [*found, f"{steps} an iteration, of each model that is trained"]


def batch_plan(recipe: Recipe) -> BatchPlan:
    """Raises UserError for an algorithm whose phases are not known here."""
    batch, block = recipe.batch, recipe.algorithm
    if block["name"] not in PLANNED:
        known = f"one of {', '.join(PLANNED)}"
        raise UserError(
            f"there is no plan for the algorithm {block['name']!r}",
            where="algorithm.name",
            fix=known,
        )
    rollout = block["name"] == "ppo"
    return BatchPlan(
        replicas=recipe.data_parallel,
        rows=batch.prompts * batch.responses if rollout else batch.minibatch,
        sequences_per_row=2 if block["name"] in PAIRS else 1,
        minibatch=batch.minibatch,
        micro_batch=batch.micro_batch,
        epochs=block["epochs"] if rollout else 1,
        prompts=batch.prompts if rollout else None,
        responses=batch.responses,
        max_length=recipe.data.max_length,
        max_response=(block["rollout"]["max_response"] if rollout else 0)
        or recipe.data.max_response,
    )
