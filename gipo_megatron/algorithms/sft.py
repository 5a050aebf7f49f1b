"""Supervised fine-tuning: maximum likelihood of the response tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from gipo_megatron import ops
from gipo_megatron.metrics import Metric, Metrics, merge_metrics, prefixed
from gipo_megatron.registry import from_runtime, register
from gipo_megatron.roles import Actor, HeldOut
from gipo_megatron.tensors import Tensor
from gipo_megatron.types import Loss, Sequences, StepResult, TokenStats, skipped_rows


def negative_log_likelihood(output: TokenStats, batch: Sequences) -> Tensor:
    """-sum_{b,t} mask log p(token_t | tokens_<t), a scalar sum over tokens."""
    return -ops.sequence_sum(output.logprobs, batch.mask).sum()


@register("algorithm", "sft")
@dataclass
class SFT:
    """Cross entropy on the responses, one optimizer step an iteration."""

    data: ClassVar[str] = "sft"
    stage: ClassVar[str] = "SFT"
    trained: ClassVar[tuple[str, ...]] = ("actor",)
    headline: ClassVar[tuple[tuple[str, str], ...]] = (
        ("eval/loss", "held-out loss"),
        ("sft/loss", "loss"),
    )

    actor: Actor = from_runtime("actor")
    examples: Callable[[int], Sequences] = from_runtime("examples")  # step -> this replica's rows
    held_out: HeldOut = from_runtime("held_out")
    timer: Callable[[str], AbstractContextManager[None]] = from_runtime("timer")

    def step(self, step: int) -> StepResult:
        batch = self.examples(step)
        with self.timer("update"):
            update = self.actor.update((batch, self.loss))
        return StepResult(
            prefixed("sft", update.metrics),
            skipped=skipped_rows(actor=update),
            tokens=int(batch.lengths.sum()),
            forward_equivalents=3,
        )

    def loss(self, output: TokenStats, batch: Sequences) -> Loss:
        nll = negative_log_likelihood(output, batch)
        return Loss({"nll": (nll, "token")}, {"loss": Metric.ratio(nll, batch.mask.sum())})

    def evaluate(self) -> tuple[Metrics, list[dict[str, Any]]]:
        """Return eval/loss, nats per response token, of held-out examples."""
        metrics: Metrics = {}
        for batch, valid in self.held_out.batches():
            logprobs = self.actor.logprobs(batch).logprobs
            weights = batch.mask.to(logprobs.device) * valid.to(logprobs.device)[:, None]
            metrics = merge_metrics(metrics, {"eval/loss": Metric.mean(-logprobs, weights)})
        return metrics, []
