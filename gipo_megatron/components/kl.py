"""KL controllers: the coefficient of the KL penalty, one per sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from torch import Tensor

from gipo_megatron.metrics import Metric, Metrics
from gipo_megatron.registry import Range, from_runtime, register
from gipo_megatron.roles import DataParallel
from gipo_megatron.types import Groups

EMA = 0.9
RAMP_START, RAMP_WIDTH = 0.1, 0.2  # of the gap, in running standard deviations (algorithm.md 5.6)

Coefficient = Annotated[float, Range(0)]  # units of the shaped score per nat of KL


def _same_for_all(coefficient: float, groups: Groups) -> Tensor:
    return torch.full_like(groups.sample_scores, coefficient)


@final
@register("kl_controller", "none")
@dataclass
class NoKL:
    """coef_i = 0: PPO without a KL term."""

    def kl_coefficients(self, groups: Groups) -> Tensor:
        return _same_for_all(0.0, groups)


@final
@register("kl_controller", "fixed")
@dataclass
class FixedKL:
    """coef_i = eta."""

    eta: Coefficient = 0.05  # KL coefficient, in units of the shaped score

    def kl_coefficients(self, groups: Groups) -> Tensor:
        return _same_for_all(self.eta, groups)


@final
@register("kl_controller", "adaptive")
@dataclass
class AdaptiveKL:
    """eta <- eta (1 + clip(KL / target - 1, +-0.2) N / horizon), once an iteration, last (Ziegler
    et al. 2019)."""

    eta: Coefficient = 0.05  # KL coefficient of the first iteration
    target: Annotated[float, Range(0, open=True)] = 6.0  # nats per response to steer to
    # sequences over which the coefficient may change by 20 %
    horizon: Annotated[int, Range(1)] = 10000

    def __post_init__(self) -> None:
        self._coefficient = self.eta

    def kl_coefficients(self, groups: Groups) -> Tensor:
        return _same_for_all(self._coefficient, groups)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self._coefficient *= 1 + error * groups.count / self.horizon
        return {"kl/next_coef": Metric.mean(self._coefficient)}

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self._coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._coefficient = state["coefficient"]


@final
@register("kl_controller", "group_adaptive")
@dataclass
class GroupAdaptiveKL:
    """Easy data stay close to the reference, hard data may explore (algorithm.md 5.6).

    s = clip((EMA gap / sigma - 0.1) / 0.2, 0, 1),   p~_i = 1 - s (1 - p_high_i),
    coef_i = eta max(floor, p~_i / mean p~ if normalise else p~_i).   The mean is over the global
    batch; the gap is in units of G already.
    """

    needs_groups: ClassVar[bool] = True

    eta: Coefficient = 0.05  # KL coefficient, in units of the shaped score
    # smallest coefficient as a share of eta: the reward model is least reliable on hard data
    floor: Annotated[float, Range(0)] = 0.1
    # divide by the batch mean of p~, so that the KL budget stays that of a fixed coefficient
    normalise: bool = True

    dp: DataParallel = from_runtime("dp")

    def __post_init__(self) -> None:
        self._gap: float | None = None  # EMA

    @property
    def ramp(self) -> float:
        """s: 0 while the gap may be noise (coef = eta for all), 1 when p~ = p_high."""
        return (
            0.0 if self._gap is None else min(max((self._gap - RAMP_START) / RAMP_WIDTH, 0.0), 1.0)
        )

    def kl_coefficients(self, groups: Groups) -> Tensor:
        share = 1 - self.ramp * (1 - groups.high_prob.double())
        if self.normalise:
            share = share / (self.dp.sum(share.sum().reshape(1))[0] / groups.count)
        return (self.eta * share.clamp(min=self.floor)).to(groups.sample_scores.dtype)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        gap = float(groups.gap)
        self._gap = gap if self._gap is None else EMA * self._gap + (1 - EMA) * gap
        return {"kl/ramp": Metric.mean(self.ramp), "kl/gap_ema": Metric.mean(self._gap)}

    def state_dict(self) -> dict[str, Any]:
        return {"gap": self._gap}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gap = state["gap"]
