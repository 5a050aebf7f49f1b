"""Variance regularisers: one weight per trajectory, larger for groups that lag. The mean weight is
1 before clamping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, final

from gipo_megatron import ops
from gipo_megatron.errors import UserError
from gipo_megatron.metrics import Metrics
from gipo_megatron.registry import OneOf, Range, from_runtime, register
from gipo_megatron.roles import DataParallel, gather_rows
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Groups, Weights

NotNegative = Annotated[float, Range(0)]  # a negative weight of the variance would widen the gap
AtMostOne = Annotated[float, Range(high=1)]  # the mean weight, 1, is within the clamp
AtLeastOne = Annotated[float, Range(1)]


def _equal_weights(groups: Groups) -> Weights:
    ones = torch.ones_like(groups.sample_scores)
    return Weights(ones, ones, ones)


def _too_small(groups: Groups) -> bool:
    """Return True if a group has less mass than one sequence (rho_g < 1/N): its mean is noise
    (algorithm.md 5.10)."""
    return bool(groups.masses.min() < 1)


@dataclass(kw_only=True)
class Bounded:
    """Base of regularisers: bounds of the weights, and what the KL penalty does with them."""

    # above 0 unless weigh_kl; a negative weight trains easy data to get worse
    min_weight: AtMostOne = 0.1
    max_weight: AtLeastOne = 3.0  # no sequence counts more than this
    # false: the KL coefficient is divided by w_i, so that training ends elsewhere (algorithm.md
    # 2.3) | true: w_i multiplies the KL penalty, too, and so only changes the speed
    weigh_kl: bool = False

    def problems(self) -> Iterator[UserError]:
        if not self.weigh_kl and self.min_weight <= 0:
            yield UserError(
                f"{self.min_weight:g}, and the KL coefficient is divided by the weight",
                where="variance_regulariser.min_weight",
                fix="a number above 0, or weigh_kl: true",
            )

    def bounded(self, raw: Tensor, groups: Groups) -> Weights:
        raw = raw.to(groups.sample_scores.dtype)
        values = raw.clamp(self.min_weight, self.max_weight)
        return Weights(raw, values, torch.ones_like(values) if self.weigh_kl else values)


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
class GroupVariance(Bounded):
    """w_i = 1 - beta N dR_var / dJ_i: gradient of the return minus beta R_var (algorithm.md 2.2,
    stage 2)."""

    needs_groups: ClassVar[bool] = True

    beta: NotNegative = 0.3  # weight of the variance between the groups' returns
    # of R_g and p_ig in the weights. soft: the classifier's | argmax: its likeliest group alone
    labels: Annotated[str, OneOf("soft", "argmax")] = "soft"

    dp: DataParallel = from_runtime("dp")

    def weights(self, groups: Groups) -> Weights:
        if self.labels == "argmax":
            groups = self._hard(groups)
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
        return self.bounded(raw, groups)

    def _hard(self, groups: Groups) -> Groups:
        """Return the groups measured with labels 0 and 1."""
        index = groups.probs.argmax(1)
        probs = torch.nn.functional.one_hot(index, groups.probs.shape[1]).to(groups.probs.dtype)
        sums = self.dp.sum(ops.group_sums(probs, groups.sample_scores))
        means, masses, _, _ = ops.group_means(sums)
        return replace(groups, probs=probs, group_means=means, masses=masses)


@final
@register("variance_regulariser", "return_variance")
@dataclass
class ReturnVariance(Bounded):
    """w_i = 1 - 2 beta (G_i - mean G): the variance of all returns, no groups. An ablation: it
    widens the gap."""

    beta: NotNegative = 0.1  # weight of the variance

    def weights(self, groups: Groups) -> Weights:
        raw = 1 - 2 * self.beta * (groups.sample_scores.double() - groups.mean_score)
        return self.bounded(raw, groups)


@final
@register("variance_regulariser", "group_dro")
@dataclass
class GroupDRO(Bounded):
    """w_i = sum_g q_g p_ig / rho_g,   q_g proportional to q_g exp(-step R_g), this batch's R_g
    included (Sagawa et al. 2020)."""

    needs_groups: ClassVar[bool] = True

    step: NotNegative = 0.1  # a: how fast q moves to the worst group; R_g in units of G

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
        return self.bounded(raw, groups)

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
    rows tied at VaR share the rest of it. The others have no KL penalty either."""

    alpha: Annotated[float, Range(0, 1, open=True)] = 0.5  # share of trajectories trained on

    dp: DataParallel = from_runtime("dp")

    def weights(self, groups: Groups) -> Weights:
        everyone = gather_rows(groups.sample_scores, self.dp)
        raw = ops.lower_tail_weights(groups.sample_scores.double(), everyone, self.alpha)
        raw = raw.to(groups.sample_scores.dtype)
        return Weights(raw, raw, torch.ones_like(raw))
