"""Group classifiers: soft labels p_ig of each trajectory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, final

from gipo_megatron import ops
from gipo_megatron.errors import UserError
from gipo_megatron.registry import OneOf, Range, from_runtime, register
from gipo_megatron.roles import DataParallel, gather_rows
from gipo_megatron.specs import HeadSpec
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Rollout

# mass: weighted by group shares | uniform: the paper's, drawn to outliers
Variance = Annotated[str, OneOf("mass", "uniform")]


def _one_hot(labels: list[int], num_groups: int, rollout: Rollout) -> Tensor:
    index = torch.tensor(labels, device=rollout.tokens.device)
    return torch.nn.functional.one_hot(index, num_groups).float()


@final
@register("group_classifier", "none")
@dataclass
class NoGroups:
    """One group: p = 1, R_var = 0, every weight 1."""

    makes_groups: ClassVar[bool] = False

    num_groups: ClassVar[int] = 1
    variance: ClassVar[str] = "mass"
    head: ClassVar[None] = None

    def probs(self, logits: Tensor | None, values: Tensor | None, rollout: Rollout) -> Tensor:
        return torch.ones(len(rollout), 1, device=rollout.tokens.device)


@final
@register("group_classifier", "critic_head")
@dataclass
class CriticHead:
    """p_i = softmax of a head on the critic's trunk, trained to maximise R_var (algorithm.md 2.2,
    stage 1)."""

    num_groups: Annotated[int, Range(1)] = 2  # M
    # prompt: hidden state of the last prompt token, can only learn difficulty | trajectory: of the
    # last token
    input: Annotated[str, OneOf("prompt", "trajectory")] = "prompt"
    variance: Variance = "mass"
    beta_critic: float = 1.0  # weight of R_var in the critic's loss
    detach_trunk: bool = False  # true: the group loss does not reach the critic's trunk
    # weight of the labels' entropy beside R_var: without it they are certain before they are right
    entropy: Annotated[float, Range(0)] = 0.03
    # the head's own learning rate, for a trunk of width 128; divided by width / 128
    lr: float = 1e-3
    # standard deviation of the head's first weights, for a trunk of width 128; divided by
    # sqrt(width / 128); above 0, since equal labels have no gradient
    init_std: Annotated[float, Range(0, open=True)] = 0.02

    needs: ClassVar[tuple[str, ...]] = ("critic",)

    @property
    def head(self) -> HeadSpec:
        return HeadSpec(
            num_groups=self.num_groups,
            input=self.input,
            detach_trunk=self.detach_trunk,
            init_std=self.init_std,
            lr=self.lr,
            loss_weight=self.beta_critic,
            entropy=self.entropy,
        )

    def probs(self, logits: Tensor | None, values: Tensor | None, rollout: Rollout) -> Tensor:
        assert logits is not None, "the critic has no group head"
        return logits.softmax(-1)


@final
@register("group_classifier", "value_split")
@dataclass
class ValueSplit:
    """Two groups: prompts whose value V(x) is above a threshold, and the others.

    V(x) is the critic's, in the state before the first response token; rows of one prompt share
    their mean. The threshold maximises rho_1 rho_2 (mean_1 V - mean_2 V)^2 over the global batch
    (Otsu 1979): the best split of R_var `mass` where V(x) = E[G | x]. Nothing is trained for it.
    """

    dp: DataParallel = from_runtime("dp")

    needs: ClassVar[tuple[str, ...]] = ("critic",)
    num_groups: ClassVar[int] = 2
    variance: ClassVar[str] = "mass"
    head: ClassVar[None] = None

    def probs(self, logits: Tensor | None, values: Tensor | None, rollout: Rollout) -> Tensor:
        assert values is not None, "value_split needs a critic"
        first = rollout.prompt_lengths[:, None].to(values.device)
        at_prompt = gather_rows(values.gather(1, first)[:, 0], self.dp)
        _, which = gather_rows(rollout.prompt_id, self.dp).unique(return_inverse=True)
        sizes = which.bincount().double()
        means = torch.zeros_like(sizes).index_add_(0, which, at_prompt) / sizes
        above = means > ops.otsu_threshold(means, sizes)
        mine = above[which][self.dp.rank :: self.dp.size]
        return torch.nn.functional.one_hot((~mine).long(), 2).float()


@final
@register("group_classifier", "labelled")
@dataclass
class LabelledGroups:
    """Groups are given: the row's data source. With known easy and hard sources, the oracle.

    Beside them a head like critic_head's learns on a detached trunk, if the recipe has a critic. It
    is for groups/auc, groups/ami and groups/flip_rate alone: how well a head recovers labels that
    are known.
    """

    variance: Variance = "mass"
    # source -> group 0 … M - 1; {}: every source is a group, in sorted order
    groups: dict[str, int] = field(default_factory=dict)

    sources: tuple[str, ...] = from_runtime("sources")

    def __post_init__(self) -> None:
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
        self.num_groups = len(used)

    @property
    def head(self) -> HeadSpec:
        return HeadSpec(self.num_groups, "prompt", detach_trunk=True, observes=True)

    def probs(self, logits: Tensor | None, values: Tensor | None, rollout: Rollout) -> Tensor:
        labels = [self._label[source] for source in rollout.source]
        return _one_hot(labels, self.num_groups, rollout)


@final
@register("group_classifier", "random")
@dataclass
class RandomGroups:
    """A control: a group per prompt, drawn once from (seed, prompt id), the same for the whole run
    and for every replica."""

    num_groups: Annotated[int, Range(2)] = 2  # M
    # mean share of group 0; the others split the rest evenly. Set it to what GIPO's groups had
    share: Annotated[float, Range(0, 1, open=True)] = 0.5
    seed: int = 0  # of the draw, separate from run.seed
    variance: Variance = "mass"

    head: ClassVar[None] = None

    def problems(self) -> Iterator[UserError]:
        if self.share == 1:
            yield UserError(
                "1.0 puts every prompt into group 0",
                where="group_classifier.share",
                fix="a number between 0 and 1",
            )

    def _label(self, prompt_id: int) -> int:
        u = _uniform(self.seed, prompt_id)
        if u < self.share:
            return 0
        return 1 + int((u - self.share) / (1 - self.share) * (self.num_groups - 1))

    def probs(self, logits: Tensor | None, values: Tensor | None, rollout: Rollout) -> Tensor:
        labels = [self._label(i) for i in rollout.prompt_id.tolist()]
        return _one_hot(labels, self.num_groups, rollout)


def _uniform(seed: int, key: int) -> float:
    """Return a number in [0, 1) that is a pure function of the arguments."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
