"""Mean and standard deviation over all numbers so far, on all replicas."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gipo_megatron import ops
from gipo_megatron.roles import DataParallel
from gipo_megatron.tensors import Tensor, torch


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of all finite numbers so far, over all replicas."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 0 before the first number."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def standardise(self, x: Tensor) -> Tensor:
        """(x - mean) / std in float64; zeros where all numbers were the same."""
        if self.std < ops.MIN_STD:
            return torch.zeros_like(x, dtype=torch.float64)
        return (x.double() - self.mean) / self.std

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both (Chan et al. 1979)."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        between = delta**2 * self.count * other.count / count
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.squares + other.squares + between,
        )


def batch_moments(x: Tensor, dp: DataParallel) -> Moments:
    """Return the moments of the global batch. x [B] is this replica's."""
    kept = x[torch.isfinite(x)].double()
    count, total = dp.sum(torch.stack([torch.ones_like(kept).sum(), kept.sum()])).tolist()
    mean = total / count if count else 0.0
    return Moments(count, mean, float(dp.sum((kept - mean).square().sum().reshape(1))[0]))
