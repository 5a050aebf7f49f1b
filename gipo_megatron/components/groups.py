"""Who belongs to which group, and which group is the easy ("high") one."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.registry import from_runtime, register
from gipo_megatron.roles import DataParallel, gather_rows
from gipo_megatron.specs import HeadSpec
from gipo_megatron.types import Groups, Metric, Metrics, Rollout, Scores

VARIANCES = ("mass", "uniform")
EMA = 0.9
# a new high group leads by this many running standard deviations for this many iterations
# (algorithm.md 5.5)
LEAD, PATIENCE = 0.1, 2


class Memory:
    """What a classifier remembers: an EMA of every group's mean raw score, which group is high, and
    the probe's last labels."""

    def __init__(self, num_groups: int) -> None:
        self.means: list[float | None] = [None] * num_groups
        self.high = 0
        self.challenger = 0
        self.led = 0  # iterations in a row that the challenger has led
        self.flips = 0
        self.probe: list[int] | None = None

    def ranks(self) -> list[float]:
        """Normalised rank of each group, 0 lowest … 1 high; of one group: 1. Two groups: 1 for the
        high one, 0 for the other."""
        others = [g for g in range(len(self.means)) if g != self.high]
        lowest_first = sorted(
            others, key=lambda g: (-math.inf if self.means[g] is None else self.means[g], -g)
        )
        top = len(self.means) - 1
        return [
            1.0 if g == self.high else lowest_first.index(g) / top for g in range(len(self.means))
        ]

    def observe(self, scores: list[float], masses: list[float], std: float) -> None:
        """scores [M]: p-weighted mean raw score; groups with less mass than one sequence are
        skipped."""
        for g, (score, mass) in enumerate(zip(scores, masses, strict=True)):
            if mass >= 1:
                old = self.means[g]
                self.means[g] = score if old is None else EMA * old + (1 - EMA) * score
        best = max(
            range(len(self.means)),
            key=lambda g: (-math.inf if self.means[g] is None else self.means[g], -g),
        )
        ruling, leading = self.means[self.high], self.means[best]
        ahead = (
            best != self.high
            and leading is not None
            and (ruling is None or leading - ruling > LEAD * std)
        )
        self.led = (self.led + 1 if best == self.challenger else 1) if ahead else 0
        self.challenger = best
        if self.led >= PATIENCE:
            self.high, self.led, self.flips = best, 0, self.flips + 1

    def flip_rate(self, labels: list[int]) -> float:
        """Share of the probe's hard labels that changed since the last call; NaN the first time."""
        before, self.probe = self.probe, labels
        pairs = list(zip(before or [], labels, strict=False))
        return sum(a != b for a, b in pairs) / len(pairs) if pairs else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "means": list(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["means"]) != len(self.means):
            raise UserError(
                f"the checkpoint has {len(state['means'])} groups, the recipe {len(self.means)}",
                where="group_classifier.num_groups",
                fix="resume with the number of groups the run began with",
            )
        vars(self).update(state, means=list(state["means"]))


def _groups(
    probs: Tensor, memory: Memory, scores: Scores, variance: str, dp: DataParallel
) -> Groups:
    """All M sums from labels and returns; one all-reduce."""
    returns, masses, mean_return, count = ops.group_returns(
        dp.sum(ops.group_sums(probs, scores.returns))
    )
    return Groups(
        probs=probs,
        high_prob=(probs * probs.new_tensor(memory.ranks())).sum(1),
        sample_returns=scores.returns,
        returns=returns,
        masses=masses,
        mean_return=mean_return,
        count=count,
        high=memory.high,
        std=scores.std,
        variance=variance,
    )


def _observe(
    groups: Groups, scores: Scores, probe_logits: Tensor | None, memory: Memory, dp: DataParallel
) -> Metrics:
    """Advance the memory. Gap and returns are logged in raw score units; what is global already, as
    the mean of one number."""
    metrics = _metrics(groups)
    weighted = dp.sum((groups.probs.double() * scores.raw.double()[:, None]).sum(0))
    memory.observe((weighted / groups.masses).tolist(), groups.masses.tolist(), scores.std)
    if probe_logits is not None:
        labels = [int(g) for g in gather_rows(probe_logits.argmax(-1), dp).tolist()]
        metrics["groups/flip_rate"] = Metric.mean(memory.flip_rate(labels))
    metrics["groups/flips"] = Metric.mean(float(memory.flips))
    return metrics


def _metrics(groups: Groups) -> Metrics:
    raw = (groups.returns * groups.std).tolist()
    others = [r for g, r in enumerate(raw) if g != groups.high]
    entropy = torch.special.entr(groups.probs.double()).sum(1)
    metrics = {
        "groups/gap": Metric.mean(groups.gap * groups.std),
        "groups/gap_std": Metric.mean(groups.gap),
        "groups/variance": Metric.mean(
            ops.group_variance(groups.returns, groups.shares, groups.mean_return, groups.variance)
        ),
        "groups/mass_min": Metric.mean(groups.shares.min()),
        "groups/label_entropy": Metric.mean(entropy),
        "groups/high_index": Metric.mean(float(groups.high)),
        "groups/flip_rate": Metric.mean(0.0),  # labels that are not learned do not change
        "groups/return_high": Metric.mean(raw[groups.high]),
        "groups/return_low": Metric.mean(min(others, default=raw[groups.high])),
        "groups/return_worst": Metric.mean(min(raw)),
    }
    for g, (value, share) in enumerate(zip(raw, groups.shares.tolist(), strict=True)):
        metrics[f"groups/return_{g}"] = Metric.mean(value)
        metrics[f"groups/share_{g}"] = Metric.mean(share)
    return metrics


def _check_variance(variance: str) -> None:
    if variance not in VARIANCES:
        raise UserError(
            f"variance is {variance!r}",
            where="group_classifier.variance",
            fix=f"one of {', '.join(VARIANCES)}",
        )


def _one_hot(labels: list[int], num_groups: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels, device=like.device), num_groups).to(
        like.dtype
    )


@final
@register("group_classifier", "none")
@dataclass
class NoGroups:
    """One group: p = 1, R_var = 0, every weight 1."""

    makes_groups: ClassVar[bool] = False

    dp: DataParallel = from_runtime("dp")

    beta_critic = 0.0
    relabel = False
    head = None

    def __post_init__(self) -> None:
        self._memory = Memory(1)

    def assign(self, group_logits: Tensor | None, rollout: Rollout, scores: Scores) -> Groups:
        return _groups(torch.ones_like(scores.raw)[:, None], self._memory, scores, "mass", self.dp)

    def coefficients(self, groups: Groups) -> Tensor:
        return torch.zeros_like(groups.probs)

    def observe(self, groups: Groups, scores: Scores, probe_logits: Tensor | None) -> Metrics:
        return _observe(groups, scores, probe_logits, self._memory, self.dp)

    def state_dict(self) -> dict[str, Any]:
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)


@final
@register("group_classifier", "critic_head")
@dataclass
class CriticHead:
    """p_i = softmax of a head on the critic's trunk, trained to maximise R_var (algorithm.md 2.2,
    stage 1)."""

    num_groups: int = 2  # M
    # prompt: hidden state of the last prompt token, can only learn difficulty | trajectory: of the
    # last token
    input: str = "prompt"
    # mass: weighted by group shares | uniform: the paper's, drawn to outliers
    variance: str = "mass"
    beta_critic: float = 1.0  # weight of R_var in the critic's loss
    detach_trunk: bool = False  # true: the group loss does not reach the critic's trunk
    # true: run the critic again after its update and take the labels from there; costs a forward
    # pass
    relabel: bool = False
    lr: float = 1e-3  # the head's own learning rate
    init_std: float = 0.02  # never 0: equal labels are a saddle

    dp: DataParallel = from_runtime("dp")

    def __post_init__(self) -> None:
        _check_variance(self.variance)
        if self.input not in ("prompt", "trajectory"):
            raise UserError(
                f"input is {self.input!r}",
                where="group_classifier.input",
                fix="prompt or trajectory",
            )
        if self.num_groups < 1:
            raise UserError(
                f"num_groups is {self.num_groups}",
                where="group_classifier.num_groups",
                fix="2, or more",
            )
        if self.init_std <= 0:
            raise UserError(
                "a group head that starts at zero never moves: equal labels have no gradient",
                where="group_classifier.init_std",
                fix="0.02",
            )
        self._memory = Memory(self.num_groups)

    @property
    def head(self) -> HeadSpec:
        return HeadSpec(self.num_groups, self.input, self.detach_trunk, self.init_std, self.lr)

    def assign(self, group_logits: Tensor | None, rollout: Rollout, scores: Scores) -> Groups:
        assert group_logits is not None, (
            "the critic was built without the group head that critic_head asks for"
        )
        return _groups(group_logits.softmax(-1), self._memory, scores, self.variance, self.dp)

    def coefficients(self, groups: Groups) -> Tensor:
        c = ops.group_coefficients(
            groups.sample_returns, groups.returns, groups.masses, groups.count, groups.variance
        )
        return c.to(groups.probs.dtype)

    def observe(self, groups: Groups, scores: Scores, probe_logits: Tensor | None) -> Metrics:
        return _observe(groups, scores, probe_logits, self._memory, self.dp)

    def state_dict(self) -> dict[str, Any]:
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)


@final
@register("group_classifier", "labelled")
@dataclass
class LabelledGroups:
    """Groups are given: the row's data source. With known easy and hard sources, the oracle.

    Beside them a head like critic_head's learns on a detached trunk, for groups/auc, groups/ami and
    groups/flip_rate alone: how much of what is known it finds when nothing follows from what it
    finds.
    """

    variance: str = "mass"  # mass | uniform
    # source -> group 0 … M - 1; {}: every source is a group, in sorted order
    groups: dict[str, int] = field(default_factory=dict)

    dp: DataParallel = from_runtime("dp")
    sources: tuple[str, ...] = from_runtime("sources")

    beta_critic = 1.0  # of the observing head
    relabel = False

    def __post_init__(self) -> None:
        _check_variance(self.variance)
        if not self.groups and len(self.sources) < 2:
            raise UserError(
                "labelled groups need two sources or more; the data have"
                f" {', '.join(self.sources)}",
                where="group_classifier.name",
                fix="read data with several sources, or use critic_head",
            )
        self._label = dict(self.groups) or {source: g for g, source in enumerate(self.sources)}
        if lacking := [source for source in self.sources if source not in self._label]:
            raise UserError(
                f"no group for source {', '.join(lacking)}",
                where="group_classifier.groups",
                fix="name every source of the data",
            )
        used = sorted({self._label[source] for source in self.sources})
        if used != list(range(len(used))):
            raise UserError(
                f"the data's sources use groups {used}",
                where="group_classifier.groups",
                fix=f"number them 0 … {len(used) - 1}",
            )
        self._memory = Memory(len(used))
        self._observer = CriticHead(
            num_groups=len(used), variance=self.variance, detach_trunk=True, dp=self.dp
        )

    @property
    def head(self) -> HeadSpec:
        return self._observer.head

    def assign(self, group_logits: Tensor | None, rollout: Rollout, scores: Scores) -> Groups:
        labels = [self._label[source] for source in rollout.source]
        given = _groups(
            _one_hot(labels, len(self._memory.means), scores.raw),
            self._memory,
            scores,
            self.variance,
            self.dp,
        )
        return replace(given, observed=self._observer.assign(group_logits, rollout, scores))

    def coefficients(self, groups: Groups) -> Tensor:
        assert groups.observed is not None
        return self._observer.coefficients(groups.observed)

    def observe(self, groups: Groups, scores: Scores, probe_logits: Tensor | None) -> Metrics:
        assert groups.observed is not None
        learned = self._observer.observe(groups.observed, scores, probe_logits)
        given = _observe(groups, scores, None, self._memory, self.dp)
        return {**given, "groups/flip_rate": learned["groups/flip_rate"]}

    def state_dict(self) -> dict[str, Any]:
        return {**self._memory.state_dict(), "observer": self._observer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = dict(state)
        self._observer.load_state_dict(own.pop("observer"))
        self._memory.load_state_dict(own)


@final
@register("group_classifier", "random")
@dataclass
class RandomGroups:
    """A control: a group per prompt, drawn once from (seed, prompt id), the same for the whole run
    and for every replica."""

    num_groups: int = 2  # M
    # mean share of group 0; the others split the rest evenly. Set it to what GIPO's groups had
    share: float = 0.5
    seed: int = 0  # of the draw; its own, so that run.seed may vary
    variance: str = "mass"  # mass | uniform

    dp: DataParallel = from_runtime("dp")

    beta_critic = 0.0
    relabel = False
    head = None

    def __post_init__(self) -> None:
        _check_variance(self.variance)
        if self.num_groups < 2 or not 0 < self.share < 1:
            raise UserError(
                f"num_groups {self.num_groups}, share {self.share}",
                where="group_classifier",
                fix="num_groups >= 2, 0 < share < 1",
            )
        self._memory = Memory(self.num_groups)

    def _label(self, prompt_id: int) -> int:
        u = _uniform(self.seed, prompt_id)
        return (
            0
            if u < self.share
            else 1 + int((u - self.share) / (1 - self.share) * (self.num_groups - 1))
        )

    def assign(self, group_logits: Tensor | None, rollout: Rollout, scores: Scores) -> Groups:
        labels = [self._label(i) for i in rollout.prompt_id.tolist()]
        return _groups(
            _one_hot(labels, self.num_groups, scores.raw),
            self._memory,
            scores,
            self.variance,
            self.dp,
        )

    def coefficients(self, groups: Groups) -> Tensor:
        return torch.zeros_like(groups.probs)

    def observe(self, groups: Groups, scores: Scores, probe_logits: Tensor | None) -> Metrics:
        return _observe(groups, scores, probe_logits, self._memory, self.dp)

    def state_dict(self) -> dict[str, Any]:
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)


def _uniform(seed: int, key: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
