"""What a nat of KL to the reference costs each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.registry import from_runtime, register
from gipo_megatron.roles import DataParallel
from gipo_megatron.types import Groups, Metric, Metrics

EMA = 0.9
RAMP_START, RAMP_WIDTH = 0.1, 0.2  # of the gap, in running standard deviations (algorithm.md 5.6)


def _same_for_all(price: float, groups: Groups) -> Tensor:
    return torch.full_like(groups.sample_returns, price)


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise UserError(
                f"{name} is {value}", where=f"kl_controller.{name}", fix="a number >= 0"
            )


@final
@register("kl_controller", "none")
@dataclass
class NoKL:
    """KL is free: PPO without a KL term."""

    def coefficients(self, groups: Groups) -> Tensor:
        return _same_for_all(0.0, groups)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@final
@register("kl_controller", "fixed")
@dataclass
class FixedKL:
    """coef_i = eta."""

    eta: float = 0.05  # price of a nat of KL, in units of the shaped score

    def __post_init__(self) -> None:
        _require_positive(eta=self.eta)

    def coefficients(self, groups: Groups) -> Tensor:
        return _same_for_all(self.eta, groups)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@final
@register("kl_controller", "adaptive")
@dataclass
class AdaptiveKL:
    """eta <- eta (1 + clip(KL / target - 1, +-0.2) N / horizon), once an iteration, last (Ziegler
    et al. 2019)."""

    eta: float = 0.05  # price of a nat of KL at the first iteration
    target: float = 6.0  # nats per response to steer to
    horizon: int = 10000  # sequences over which the price may change by 20 %

    def __post_init__(self) -> None:
        _require_positive(eta=self.eta)
        if self.target <= 0 or self.horizon <= 0:
            raise UserError(
                f"target {self.target}, horizon {self.horizon}",
                where="kl_controller",
                fix="both must be > 0",
            )
        self._price = self.eta

    def coefficients(self, groups: Groups) -> Tensor:
        return _same_for_all(self._price, groups)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self._price *= 1 + error * groups.count / self.horizon
        return {"kl/next_coef": Metric.mean(self._price)}

    def state_dict(self) -> dict[str, Any]:
        return {"price": self._price}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._price = state["price"]


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

    eta: float = 0.05  # price of a nat of KL, in units of the shaped score
    # no sequence pays less than this share of eta: the reward model is least reliable on hard data
    floor: float = 0.1
    # divide by the batch mean of p~, so that the KL budget stays that of a fixed price
    normalise: bool = True

    dp: DataParallel = from_runtime("dp")

    def __post_init__(self) -> None:
        _require_positive(eta=self.eta, floor=self.floor)
        self._gap: float | None = None  # EMA

    @property
    def ramp(self) -> float:
        """s, from 0 (the split is not told from noise: everyone pays eta) to 1."""
        return (
            0.0 if self._gap is None else min(max((self._gap - RAMP_START) / RAMP_WIDTH, 0.0), 1.0)
        )

    def coefficients(self, groups: Groups) -> Tensor:
        share = 1 - self.ramp * (1 - groups.high_prob.double())
        if self.normalise:
            share = share / (self.dp.sum(share.sum().reshape(1))[0] / groups.count)
        return (self.eta * share.clamp(min=self.floor)).to(groups.sample_returns.dtype)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        gap = float(groups.gap)
        self._gap = gap if self._gap is None else EMA * self._gap + (1 - EMA) * gap
        return {"kl/ramp": Metric.mean(self.ramp), "kl/gap_ema": Metric.mean(self._gap)}

    def state_dict(self) -> dict[str, Any]:
        return {"gap": self._gap}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gap = state["gap"]
