"""Direct preference optimisation: the policy is its own reward model, measured against a frozen
reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.algorithms.dpo_reference import PairReference, ReferredPairs, response_sums
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.registry import OneOf, Range, from_runtime, register
from gipo_megatron.roles import Actor
from gipo_megatron.types import Loss, Metric, Pairs, StepResult, TokenStats, prefixed


@dataclass(frozen=True)
class Preference:
    """What the policy's implicit reward beta * log(pi / pi_ref) says of each pair, all [b]."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen_reward - self.rejected_reward


@register("algorithm", "dpo")
@dataclass
class DPO:
    """One optimizer step an iteration on the pairs' loss; the reference is asked once for all
    pairs, or for each batch as it comes."""

    trained: ClassVar[tuple[str, ...]] = ("actor",)

    beta: Annotated[float, Range(0, open=True)] = 0.1
    loss: Annotated[str, OneOf("sigmoid", "ipo")] = "sigmoid"
    label_smoothing: Annotated[float, Range(0)] = 0.0
    length_normalise: bool = False
    precompute: bool = True  # read where the reference is made

    actor: Actor = from_runtime("actor")
    reference: PairReference = from_runtime("reference")
    pairs: Callable[[int], Pairs] = from_runtime("pairs")  # step -> this replica's rows
    phase: Callable[[str], AbstractContextManager[None]] = from_runtime("phase")

    def __post_init__(self) -> None:
        if self.label_smoothing >= 0.5:
            what = f"{self.label_smoothing} must be below 0.5: more wrong labels than right ones"
            raise UserError(
                what,
                where="label_smoothing",
                fix="the share of pairs whose label is wrong, such as 0.1",
            )
        if self.loss == "ipo" and self.label_smoothing > 0:
            raise UserError(
                "the ipo loss has no label smoothing",
                where="label_smoothing",
                fix="loss: sigmoid, or label_smoothing: 0.0",
            )

    def step(self, step: int) -> StepResult:
        pairs = self.pairs(step)
        with self.phase("reference"):
            batch = self.reference.refer("train", pairs)
        with self.phase("update"):
            update = self.actor.update((batch, self.objective))
        skipped = {} if update.skipped is None else {"actor": update.skipped}
        tokens, passes = int(batch.sequences.lengths.sum()), 3 if self.precompute else 4
        return StepResult(
            prefixed("dpo", update.metrics), skipped=skipped, tokens=tokens, passes=passes
        )

    def objective(self, output: TokenStats, batch: ReferredPairs) -> Loss:
        found = self.preference(output, batch)
        metrics = {
            "loss": Metric.mean(found.loss),
            "accuracy": Metric.mean((found.margin > 0).float()),
            "margin": Metric.mean(found.margin),
            "chosen_reward": Metric.mean(found.chosen_reward),
            "rejected_reward": Metric.mean(found.rejected_reward),
        }
        return Loss({"preference": (found.loss.sum(), "pair")}, metrics)

    def preference(self, output: TokenStats, batch: ReferredPairs) -> Preference:
        """log(pi / pi_ref) of a response is the sum over its tokens; with `length_normalise`, their
        mean."""
        log_ratio = response_sums(output, batch) - batch.reference.to(output.logprobs)
        if self.length_normalise:
            log_ratio = log_ratio / batch.response_lengths.to(log_ratio)
        chosen, rejected = log_ratio.unbind(1)
        if self.loss == "ipo":
            loss = ops.ipo_loss(chosen - rejected, self.beta)
        else:
            loss = ops.dpo_loss(chosen - rejected, self.beta, self.label_smoothing)
        return Preference(loss, self.beta * chosen.detach(), self.beta * rejected.detach())

    def held_out(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Loss and margin of held-out pairs, [b] each."""
        batch = self.reference.refer("held_out", pairs)
        found = self.preference(self.actor.logprobs(batch), batch)
        return found.loss, found.margin

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference.load_state_dict(state["reference"])
