"""An algorithm, with a field that may be None."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from gipo_megatron import ops
from gipo_megatron.metrics import Metric, Metrics, prefixed
from gipo_megatron.registry import Range, from_runtime, register
from gipo_megatron.roles import Actor, HeldOut
from gipo_megatron.types import Loss, Sequences, StepResult, TokenStats, skipped_rows


@register("algorithm", "focal_sft")
@dataclass
class FocalSFT:
    """-(1 - p)^focus log p per token: fine-tuning that cares less for tokens that are likely."""

    data: ClassVar[str] = "sft"
    stage: ClassVar[str] = "focal SFT"
    trained: ClassVar[tuple[str, ...]] = ("actor",)
    headline: ClassVar[tuple[tuple[str, str], ...]] = (("focal/loss", "loss"),)

    focus: Annotated[float, Range(0)] = 1.0

    actor: Actor | None = from_runtime("actor")
    examples: Callable[[int], Sequences] = from_runtime("examples")
    held_out: HeldOut = from_runtime("held_out")
    timer: Callable[[str], AbstractContextManager[None]] = from_runtime("timer")

    def step(self, step: int) -> StepResult:
        batch = self.examples(step)
        assert self.actor is not None
        with self.timer("update"):
            update = self.actor.update((batch, self.loss))
        return StepResult(prefixed("focal", update.metrics), skipped=skipped_rows(actor=update))

    def loss(self, output: TokenStats, batch: Sequences) -> Loss:
        weight = (1 - torch.exp(output.logprobs)) ** self.focus
        total = -ops.sequence_sum(weight * output.logprobs, batch.mask).sum()
        return Loss({"focal": (total, "token")}, {"loss": Metric.ratio(total, batch.mask.sum())})

    def evaluate(self) -> tuple[Metrics, list[dict[str, Any]]]:
        return {}, []
