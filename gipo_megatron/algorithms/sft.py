"""Supervised fine-tuning: maximum likelihood of the response tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.recipe.registry import from_runtime, register
from gipo_megatron.roles import Actor
from gipo_megatron.types import Loss, Metric, Sequences, StepResult, TokenStats, prefixed


def negative_log_likelihood(output: TokenStats, batch: Sequences) -> Tensor:
    """-sum_{b,t} mask log p(token_t | tokens_<t), a scalar sum over tokens."""
    return -ops.sequence_sum(output.logprobs, batch.mask).sum()


@register("algorithm", "sft")
@dataclass
class SFT:
    """Cross entropy on the responses, one optimizer step an iteration."""

    trained: ClassVar[tuple[str, ...]] = ("actor",)

    actor: Actor = from_runtime("actor")
    examples: Callable[[int], Sequences] = from_runtime("examples")  # step -> this replica's rows
    phase: Callable[[str], AbstractContextManager[None]] = from_runtime("phase")

    def step(self, step: int) -> StepResult:
        batch = self.examples(step)
        with self.phase("update"):
            update = self.actor.update((batch, self.loss))
        skipped = {} if update.skipped is None else {"actor": update.skipped}
        return StepResult(
            prefixed("sft", update.metrics),
            skipped=skipped,
            tokens=int(batch.lengths.sum()),
            passes=3,
        )

    def loss(self, output: TokenStats, batch: Sequences) -> Loss:
        nll = negative_log_likelihood(output, batch)
        return Loss(
            {"nll": (nll, "token")},
            {
                "loss": Metric(
                    "mean", torch.stack([nll.detach().double(), batch.mask.sum().double()])
                )
            },
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
