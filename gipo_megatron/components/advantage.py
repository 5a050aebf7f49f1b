"""Advantages from token rewards and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.recipe.registry import from_runtime, register
from gipo_megatron.roles import DataParallel
from gipo_megatron.types import Rollout


@final
@register("advantage", "gae")
@dataclass
class GeneralisedAdvantage:
    """GAE(gamma, lambda), whitened once over all response tokens of the global batch, never again
    per minibatch."""

    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda: 0 = one-step, 1 = Monte Carlo
    whiten: bool = True  # advantages get mean 0, variance 1 over the global batch

    dp: DataParallel = from_runtime("dp")

    needs: ClassVar[tuple[str, ...]] = ("critic",)

    def estimate(
        self, rewards: Tensor, values: Tensor | None, rollout: Rollout
    ) -> tuple[Tensor, Tensor]:
        """Return (advantages, returns), both [B, T]; returns are A + V before whitening."""
        assert values is not None, "gae needs a critic"
        advantages, returns = ops.gae(rewards, values, rollout.mask, self.gamma, self.lam)
        if self.whiten:
            advantages = ops.whiten(advantages, rollout.mask, self.dp.sum)
        return advantages, returns
