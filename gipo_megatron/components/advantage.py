"""From token rewards and values to advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.recipe.registry import from_runtime, register
from gipo_megatron.roles import DataParallel


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

    def estimate(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(advantages, returns), both [B, T]; returns are A + V before whitening."""
        advantages, returns = ops.gae(rewards, values, mask, self.gamma, self.lam)
        return (ops.whiten(advantages, mask, self.dp.sum) if self.whiten else advantages), returns
