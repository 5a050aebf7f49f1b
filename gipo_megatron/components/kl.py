"""KL controllers: the coefficient of the KL penalty, one per sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

from gipo_megatron import ops
from gipo_megatron.metrics import Metric, Metrics
from gipo_megatron.registry import Range, from_runtime, register
from gipo_megatron.roles import DataParallel, gather_rows
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Groups

EMA = 0.9
RAMP_START, RAMP_WIDTH = 0.1, 0.2  # of the gap, in running standard deviations (algorithm.md 5.6)

Coefficient = Annotated[float, Range(0)]  # units of the shaped score per nat of KL
Target = Annotated[float, Range(0, open=True)]  # nats per response
Horizon = Annotated[int, Range(1)]  # sequences over which the coefficient may change by 20 %


def _same_for_all(coefficient: float, groups: Groups) -> Tensor:
    return torch.full_like(groups.sample_scores, coefficient)


def _steered(coefficient: float, kl: float, target: float, count: int, horizon: int) -> float:
    """eta (1 + clip(KL / target - 1, +-0.2) N / horizon)   (Ziegler et al. 2019)"""
    if not math.isfinite(kl):
        return coefficient
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * count / horizon)


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
    """One coefficient, steered to a KL target once an iteration, last (Ziegler et al. 2019)."""

    eta: Coefficient = 0.05  # KL coefficient of the first iteration
    target: Target = 6.0  # nats per response to steer to
    horizon: Horizon = 10000  # sequences over which the coefficient may change by 20 %

    def __post_init__(self) -> None:
        self._coefficient = self.eta

    def kl_coefficients(self, groups: Groups) -> Tensor:
        return _same_for_all(self._coefficient, groups)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        self._coefficient = _steered(self._coefficient, kl, self.target, groups.count, self.horizon)
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

    p~_i = 1 - s (1 - p_high_i),   s = clip((gap - 0.1) / 0.2, 0, 1),   coef_i = eta c_i,
    c = the point nearest to p~ / mean p~ in floor <= c_i <= ceiling, mean c = 1.

    gap: between today's high group and the lowest other one, from an EMA of each group's R_g -
    R_all, in units of G. Means are over the global batch.
    """

    needs_groups: ClassVar[bool] = True

    eta: Coefficient = 0.05  # KL coefficient, in units of the shaped score
    # smallest coefficient as a share of eta: the reward model is least reliable on hard data
    floor: Annotated[float, Range(0, 1)] = 0.1
    ceiling: Annotated[float, Range(1)] = 3.0  # largest coefficient as a share of eta
    # the mean coefficient is exactly eta; false: c = clip(p~, floor, ceiling)
    normalise: bool = True
    ramp: bool = True  # false: s = 1 from the first iteration on
    # nats per response to steer eta to, as `adaptive` does; null: eta stays
    target: Target | None = None
    horizon: Horizon = 10000  # of target: sequences over which eta may change by 20 %

    dp: DataParallel = from_runtime("dp")

    def __post_init__(self) -> None:
        self._level = self.eta
        self._leads: dict[int, float] = {}  # group -> EMA of R_g - R_all

    def gap(self, high: int) -> float:
        """Return the lead of the high group over the lowest other one; 0 until both are known."""
        others = [lead for g, lead in self._leads.items() if g != high]
        return self._leads[high] - min(others) if high in self._leads and others else 0.0

    def strength(self, high: int) -> float:
        """Return s: 0 while the gap may be noise (coef = eta for all), 1 when p~ = p_high."""
        return min(max((self.gap(high) - RAMP_START) / RAMP_WIDTH, 0.0), 1.0) if self.ramp else 1.0

    def kl_coefficients(self, groups: Groups) -> Tensor:
        share = 1 - self.strength(groups.high) * (1 - groups.high_prob.double())
        if not self.normalise:
            relative = share.clamp(self.floor, self.ceiling)
        else:
            everyone = gather_rows(share, self.dp)
            mean = everyone.mean().clamp(min=ops.MIN_STD)
            bounded = ops.with_mean_one(everyone / mean, self.floor, self.ceiling)
            relative = bounded[self.dp.rank :: self.dp.size]
        return (self._level * relative).to(groups.sample_scores.dtype)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        leads = (groups.group_means - groups.mean_score).tolist()
        for g, (lead, mass) in enumerate(zip(leads, groups.masses.tolist(), strict=True)):
            if mass >= 1 and math.isfinite(lead):  # below one sequence: noise
                self._leads[g] = EMA * self._leads.get(g, lead) + (1 - EMA) * lead
        if self.target is not None:
            self._level = _steered(self._level, kl, self.target, groups.count, self.horizon)
        return {
            "kl/ramp": Metric.mean(self.strength(groups.high)),
            "kl/gap_ema": Metric.mean(self.gap(groups.high)),
            "kl/next_coef": Metric.mean(self._level),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"leads": dict(self._leads), "level": self._level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._leads, self._level = dict(state["leads"]), state["level"]
