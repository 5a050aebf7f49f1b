"""Variance regularisers: one weight per trajectory, larger for groups that lag. The mean weight is
1 before clamping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.metrics import Metrics
from gipo_megatron.registry import Range, from_runtime, register
from gipo_megatron.roles import DataParallel, gather_rows
from gipo_megatron.types import Groups, Weights

NotNegative = Annotated[float, Range(0)]  # a negative weight of the variance would widen the gap
AtMostOne = Annotated[float, Range(high=1)]  # the mean weight, 1, is within the clamp
AtLeastOne = Annotated[float, Range(1)]


def _equal_weights(groups: Groups) -> Weights:
    ones = torch.ones_like(groups.sample_scores)
    return Weights(ones, ones)


def _too_small(groups: Groups) -> bool:
    """Return True if a group has less mass than one sequence (rho_g < 1/N): its mean is noise
    (algorithm.md 5.10)."""
    return bool(groups.masses.min() < 1)


def _clamped(raw: Tensor, groups: Groups, low: float, high: float) -> Weights:
    raw = raw.to(groups.sample_scores.dtype)
    return Weights(raw, raw.clamp(low, high))


@final
@register("variance_regulariser", "none")
@dataclass
class NoVariance:
    """w_i = 1: plain PPO."""

    def weights(self, groups: Groups) -> Weights:
        return _equal_weights(groups)


@final
@register("variance_regulariser", "group_variance")
@dataclass
class GroupVariance:
    """w_i = 1 - beta N dR_var / dJ_i: gradient of the return minus beta R_var (algorithm.md 2.2,
    stage 2)."""

    needs_groups: ClassVar[bool] = True

    beta: NotNegative = 0.3  # weight of the variance between the groups' returns
    min_weight: AtMostOne = 0.0  # a negative weight trains easy data to get worse
    max_weight: AtLeastOne = 3.0

    def weights(self, groups: Groups) -> Weights:
        if len(groups.group_means) == 1 or _too_small(groups):
            return _equal_weights(groups)
        lead = groups.group_means - groups.mean_score
        # rounding, and the floor under small masses, would otherwise move the mean weight from 1
        lead = lead - (groups.shares * lead).sum()
        raw = ops.group_weights(
            groups.probs,
            groups.mean_score + lead,
            groups.shares,
            groups.mean_score,
            self.beta,
            groups.variance,
        )
        return _clamped(raw, groups, self.min_weight, self.max_weight)


@final
@register("variance_regulariser", "return_variance")
@dataclass
class ReturnVariance:
    """w_i = 1 - 2 beta (G_i - mean G): the variance of all returns, no groups. An ablation: it
    widens the gap."""

    beta: NotNegative = 0.1  # weight of the variance
    min_weight: AtMostOne = 0.0
    max_weight: AtLeastOne = 3.0

    def weights(self, groups: Groups) -> Weights:
        raw = 1 - 2 * self.beta * (groups.sample_scores.double() - groups.mean_score)
        return _clamped(raw, groups, self.min_weight, self.max_weight)


@final
@register("variance_regulariser", "group_dro")
@dataclass
class GroupDRO:
    """w_i = sum_g q_g p_ig / rho_g,   q_g proportional to q_g exp(-step R_g), this batch's R_g
    included (Sagawa et al. 2020)."""

    needs_groups: ClassVar[bool] = True

    step: NotNegative = 0.1  # a: how fast q moves to the worst group; R_g in units of G
    min_weight: AtMostOne = 0.0
    max_weight: AtLeastOne = 3.0

    def __post_init__(self) -> None:
        self._log_q: list[float] | None = None

    def _updated(self, groups: Groups) -> Tensor:
        """Return log q [M]; it does not move while a group is too small to have a mean."""
        log_q = (
            groups.group_means.new_tensor(self._log_q)
            if self._log_q is not None
            else torch.zeros_like(groups.group_means)
        )
        if not _too_small(groups):
            log_q = log_q - self.step * groups.group_means
        return log_q.log_softmax(0)

    def weights(self, groups: Groups) -> Weights:
        if _too_small(groups):
            return _equal_weights(groups)
        raw = (groups.probs.double() * (self._updated(groups).exp() / groups.shares)).sum(1)
        return _clamped(raw, groups, self.min_weight, self.max_weight)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        self._log_q = self._updated(groups).tolist()
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"log_q": self._log_q}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_q = state["log_q"]


@final
@register("variance_regulariser", "cvar")
@dataclass
class CVaR:
    """w_i = 1{G_i <= VaR_alpha} / alpha: only the worst share alpha of the global batch counts;
    rows tied at VaR share the rest of it."""

    alpha: Annotated[float, Range(0, 1, open=True)] = 0.5  # share of trajectories trained on

    dp: DataParallel = from_runtime("dp")

    def weights(self, groups: Groups) -> Weights:
        everyone = gather_rows(groups.sample_scores, self.dp)
        raw = ops.lower_tail_weights(groups.sample_scores.double(), everyone, self.alpha)
        raw = raw.to(groups.sample_scores.dtype)
        return Weights(raw, raw)
