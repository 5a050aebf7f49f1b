"""One weight per trajectory: what makes the policy care for the groups that lag. Mean weight = 1
before clamping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.registry import from_runtime, register
from gipo_megatron.roles import DataParallel, gather_rows
from gipo_megatron.types import Groups, Weights


def _equal_weights(groups: Groups) -> Weights:
    ones = torch.ones_like(groups.sample_returns)
    return Weights(ones, ones)


def _too_small(groups: Groups) -> bool:
    """One group has less than one sequence's worth of mass (rho_g < 1/N): its mean return says
    nothing (algorithm.md 5.10)."""
    return bool(groups.masses.min() < 1)


def _clamped(raw: Tensor, groups: Groups, low: float, high: float) -> Weights:
    raw = raw.to(groups.sample_returns.dtype)
    return Weights(raw, raw.clamp(low, high))


def _check_beta(beta: float) -> None:
    if beta < 0:
        raise UserError(
            f"beta is {beta}: it would widen the gap",
            where="variance_regulariser.beta",
            fix="a number >= 0",
        )


def _check_clamp(low: float, high: float) -> None:
    if not low <= 1 <= high:
        raise UserError(
            f"min_weight {low}, max_weight {high}",
            where="variance_regulariser",
            fix="min_weight <= 1 <= max_weight: the mean weight is 1",
        )


@final
@register("variance_regulariser", "none")
@dataclass
class NoVariance:
    """w_i = 1: plain PPO."""

    def weights(self, groups: Groups) -> Weights:
        return _equal_weights(groups)

    def observe(self, groups: Groups) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@final
@register("variance_regulariser", "group_variance")
@dataclass
class GroupVariance:
    """w_i = 1 - beta N dR_var / dJ_i: gradient of the return minus beta R_var (algorithm.md 2.2,
    stage 2).

    `return_ema` > 0 uses an exponential mean of R_g - R_all, which carries less of the within-group
    noise (algorithm.md 5.11).
    """

    needs_groups: ClassVar[bool] = True

    beta: float = 0.3  # weight of the variance between the groups' returns
    min_weight: float = 0.0  # a negative weight trains easy data to get worse
    max_weight: float = 3.0
    return_ema: float = 0.0  # decay of the mean of R_g - R_all; 0: this batch alone

    def __post_init__(self) -> None:
        _check_beta(self.beta)
        _check_clamp(self.min_weight, self.max_weight)
        if not 0 <= self.return_ema < 1:
            raise UserError(
                f"return_ema is {self.return_ema}",
                where="variance_regulariser.return_ema",
                fix="0 <= return_ema < 1",
            )
        self._lead: list[float] | None = None  # R_g - R_all [M], EMA

    def weights(self, groups: Groups) -> Weights:
        if len(groups.returns) == 1 or _too_small(groups):
            return _equal_weights(groups)
        lead = self._smoothed(groups)
        # so that the mean weight is 1 whatever the average remembers
        lead = lead - (groups.shares * lead).sum()
        raw = ops.group_weights(
            groups.probs,
            groups.mean_return + lead,
            groups.shares,
            groups.mean_return,
            self.beta,
            groups.variance,
        )
        return _clamped(raw, groups, self.min_weight, self.max_weight)

    def _smoothed(self, groups: Groups) -> Tensor:
        now = groups.returns - groups.mean_return
        if self._lead is None:
            return now
        return self.return_ema * now.new_tensor(self._lead) + (1 - self.return_ema) * now

    def observe(self, groups: Groups) -> None:
        if self.return_ema > 0 and not _too_small(groups):
            self._lead = self._smoothed(groups).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"lead": self._lead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lead = state["lead"]


@final
@register("variance_regulariser", "return_variance")
@dataclass
class ReturnVariance:
    """w_i = 1 - 2 beta (G_i - mean G): the variance of all returns, no groups. An ablation: it
    widens the gap."""

    beta: float = 0.1  # weight of the variance
    min_weight: float = 0.0
    max_weight: float = 3.0

    def __post_init__(self) -> None:
        _check_beta(self.beta)
        _check_clamp(self.min_weight, self.max_weight)

    def weights(self, groups: Groups) -> Weights:
        raw = 1 - 2 * self.beta * (groups.sample_returns.double() - groups.mean_return)
        return _clamped(raw, groups, self.min_weight, self.max_weight)

    def observe(self, groups: Groups) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@final
@register("variance_regulariser", "group_dro")
@dataclass
class GroupDRO:
    """w_i = sum_g q_g p_ig / rho_g,   q_g proportional to q_g exp(-step R_g), this batch's R_g
    included (Sagawa et al. 2020)."""

    needs_groups: ClassVar[bool] = True

    step: float = 0.1  # a: how fast q moves to the worst group; R_g in units of G
    min_weight: float = 0.0
    max_weight: float = 3.0

    def __post_init__(self) -> None:
        if self.step < 0:
            raise UserError(
                f"step is {self.step}", where="variance_regulariser.step", fix="a number >= 0"
            )
        _check_clamp(self.min_weight, self.max_weight)
        self._log_q: list[float] | None = None

    def _updated(self, groups: Groups) -> Tensor:
        """log q [M]; unchanged while a group is too small to have a return."""
        log_q = (
            groups.returns.new_tensor(self._log_q)
            if self._log_q is not None
            else torch.zeros_like(groups.returns)
        )
        if not _too_small(groups):
            log_q = log_q - self.step * groups.returns
        return log_q.log_softmax(0)

    def weights(self, groups: Groups) -> Weights:
        if _too_small(groups):
            return _equal_weights(groups)
        raw = (groups.probs.double() * (self._updated(groups).exp() / groups.shares)).sum(1)
        return _clamped(raw, groups, self.min_weight, self.max_weight)

    def observe(self, groups: Groups) -> None:
        self._log_q = self._updated(groups).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"log_q": self._log_q}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_q = state["log_q"]


@final
@register("variance_regulariser", "cvar")
@dataclass
class CVaR:
    """w_i = 1{G_i <= VaR_alpha} / alpha: only the worst share alpha of the global batch counts;
    rows tied at VaR share what is left."""

    alpha: float = 0.5  # share of trajectories that is trained on

    dp: DataParallel = from_runtime("dp")

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UserError(
                f"alpha is {self.alpha}", where="variance_regulariser.alpha", fix="0 < alpha <= 1"
            )

    def weights(self, groups: Groups) -> Weights:
        raw = ops.lower_tail_weights(
            groups.sample_returns.double(), gather_rows(groups.sample_returns, self.dp), self.alpha
        )
        raw = raw.to(groups.sample_returns.dtype)
        return Weights(raw, raw)

    def observe(self, groups: Groups) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
