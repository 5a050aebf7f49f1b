"""Reward model: Bradley-Terry likelihood of the preferences."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from gipo_megatron.algorithms.held_out import evaluate_pairs
from gipo_megatron.metrics import Metric, Metrics, prefixed
from gipo_megatron.registry import Range, from_runtime, register
from gipo_megatron.roles import HeldOut, RewardModel
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Loss, Pairs, StepResult, skipped_rows


@register("algorithm", "reward_model")
@dataclass
class RewardModelling:
    """-log sigmoid(s_chosen - s_rejected) per pair; `centre` adds centre * (s_chosen +
    s_rejected)^2 (Eisenstein et al. 2023)."""

    data: ClassVar[str] = "preference"
    stage: ClassVar[str] = "reward model"
    trained: ClassVar[tuple[str, ...]] = ("reward",)
    headline: ClassVar[tuple[tuple[str, str], ...]] = (
        ("eval/accuracy", "held-out accuracy"),
        ("rm/accuracy", "accuracy"),
        ("rm/loss", "loss"),
    )

    # weight of (s_chosen + s_rejected)^2: without it scores of different prompts have any offsets
    centre: Annotated[float, Range(0)] = 0.01

    reward: RewardModel = from_runtime("reward")
    pairs: Callable[[int], Pairs] = from_runtime("pairs")  # step -> this replica's rows
    held_out: HeldOut = from_runtime("held_out")
    timer: Callable[[str], AbstractContextManager[None]] = from_runtime("timer")

    def step(self, step: int) -> StepResult:
        batch = self.pairs(step)
        with self.timer("update"):
            update = self.reward.update((batch, self.loss))
        return StepResult(
            prefixed("rm", update.metrics),
            skipped=skipped_rows(reward=update),
            tokens=int(batch.sequences.lengths.sum()),
            forward_equivalents=3,
        )

    def loss(self, scores: Tensor, batch: Pairs) -> Loss:
        """scores [2b]: all chosen, then all rejected."""
        chosen, rejected = scores.chunk(2)
        margin = chosen - rejected
        loss = -torch.nn.functional.logsigmoid(margin)
        terms = {"preference": (loss.sum(), "pair")}
        if self.centre > 0:
            terms["centre"] = (self.centre * (chosen + rejected).square().sum(), "pair")
        return Loss(
            terms,
            {
                "loss": Metric.mean(loss),
                "accuracy": Metric.mean((margin > 0).float()),
                "margin": Metric.mean(margin),
            },
        )

    def evaluate(self) -> tuple[Metrics, list[dict[str, Any]]]:
        """Return eval/{loss, accuracy, margin, pairs} of held-out pairs."""

        def loss_and_margin(batch: Pairs) -> tuple[Tensor, Tensor]:
            chosen, rejected = self.reward.score(batch).chunk(2)
            return -torch.nn.functional.logsigmoid(chosen - rejected), chosen - rejected

        return evaluate_pairs(loss_and_margin, self.held_out), []
