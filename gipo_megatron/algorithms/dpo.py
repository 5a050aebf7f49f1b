"""Direct preference optimisation: the policy is its own reward model, measured against a frozen
reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from gipo_megatron import ops
from gipo_megatron.algorithms.held_out import evaluate_pairs
from gipo_megatron.algorithms.pair_reference import PairReference, ReferredPairs, response_sums
from gipo_megatron.errors import UserError
from gipo_megatron.metrics import Metric, Metrics, prefixed
from gipo_megatron.registry import OneOf, Range, from_runtime, register
from gipo_megatron.roles import Actor, HeldOut, Stateful
from gipo_megatron.tensors import Tensor
from gipo_megatron.types import Loss, Pairs, StepResult, TokenStats, skipped_rows


@dataclass(frozen=True)
class Preference:
    """Loss and implicit rewards beta * log(pi / pi_ref) of each pair, all [b]."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen_reward - self.rejected_reward


@register("algorithm", "dpo")
@dataclass
class DPO:
    """One optimizer step an iteration on the pairs' loss; the reference's log-probs are computed
    once for all pairs, or for each batch."""

    data: ClassVar[str] = "preference"
    stage: ClassVar[str] = "DPO"
    trained: ClassVar[tuple[str, ...]] = ("actor",)
    headline: ClassVar[tuple[tuple[str, str], ...]] = (
        ("eval/accuracy", "held-out accuracy"),
        ("dpo/accuracy", "accuracy"),
        ("dpo/loss", "loss"),
    )

    beta: Annotated[float, Range(0, open=True)] = 0.1
    loss: Annotated[str, OneOf("sigmoid", "ipo")] = "sigmoid"
    label_smoothing: Annotated[float, Range(0)] = 0.0
    length_normalise: bool = False
    precompute: bool = True  # once for all pairs; then the reference is freed

    actor: Actor = from_runtime("actor")
    reference: PairReference = from_runtime("reference")
    pairs: Callable[[int], Pairs] = from_runtime("pairs")  # step -> this replica's rows
    held_out: HeldOut = from_runtime("held_out")
    timer: Callable[[str], AbstractContextManager[None]] = from_runtime("timer")

    def problems(self) -> Iterator[UserError]:
        if self.label_smoothing >= 0.5:
            what = f"{self.label_smoothing} must be below 0.5: more wrong labels than right ones"
            yield UserError(
                what,
                where="label_smoothing",
                fix="the share of pairs whose label is wrong, such as 0.1",
            )
        if self.loss == "ipo" and self.label_smoothing > 0:
            yield UserError(
                "the ipo loss has no label smoothing",
                where="label_smoothing",
                fix="loss: sigmoid, or label_smoothing: 0.0",
            )

    def step(self, step: int) -> StepResult:
        pairs = self.pairs(step)
        with self.timer("reference"):
            batch = self.reference.refer("train", pairs)
        with self.timer("update"):
            update = self.actor.update((batch, self.objective))
        return StepResult(
            prefixed("dpo", update.metrics),
            skipped=skipped_rows(actor=update),
            tokens=int(batch.sequences.lengths.sum()),
            forward_equivalents=3 if self.precompute else 4,
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
            loss = ops.preference_loss(chosen - rejected, self.beta, self.label_smoothing)
        return Preference(loss, self.beta * chosen.detach(), self.beta * rejected.detach())

    def evaluate(self) -> tuple[Metrics, list[dict[str, Any]]]:
        """Return eval/{loss, accuracy, margin, pairs} of held-out pairs."""

        def loss_and_margin(pairs: Pairs) -> tuple[Tensor, Tensor]:
            batch = self.reference.refer("held_out", pairs)
            found = self.preference(self.actor.logprobs(batch), batch)
            return found.loss, found.margin

        return evaluate_pairs(loss_and_margin, self.held_out), []

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._memory().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._memory().items():
            part.load_state_dict(state.get(name, {}))

    def _memory(self) -> dict[str, Stateful]:
        reference = self.reference
        return {"reference": reference} if isinstance(reference, Stateful) else {}
