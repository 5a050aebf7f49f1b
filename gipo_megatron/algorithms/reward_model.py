"""Reward model: Bradley-Terry likelihood of the preferences."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from gipo_megatron.recipe.registry import Range, from_runtime, register
from gipo_megatron.roles import RewardModel
from gipo_megatron.types import Loss, Metric, Pairs, StepResult, prefixed


@register("algorithm", "reward_model")
@dataclass
class RewardModelling:
    """-log sigmoid(s_chosen - s_rejected) per pair; `centre` adds centre * (s_chosen +
    s_rejected)^2 (Eisenstein et al. 2023)."""

    trained: ClassVar[tuple[str, ...]] = ("reward",)

    centre: Annotated[float, Range(0)] = 0.0

    reward: RewardModel = from_runtime("reward")
    pairs: Callable[[int], Pairs] = from_runtime("pairs")  # step -> this replica's rows
    phase: Callable[[str], AbstractContextManager[None]] = from_runtime("phase")

    def step(self, step: int) -> StepResult:
        batch = self.pairs(step)
        with self.phase("update"):
            update = self.reward.update((batch, self.loss))
        skipped = {} if update.skipped is None else {"reward": update.skipped}
        return StepResult(
            prefixed("rm", update.metrics),
            skipped=skipped,
            tokens=int(batch.sequences.lengths.sum()),
            passes=3,
        )

    def loss(self, scores: Tensor, batch: Pairs) -> Loss:
        """scores [2b]: all chosen, then all rejected."""
        chosen, rejected = scores.chunk(2)
        margin = chosen - rejected
        loss = -logsigmoid(margin)
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

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
