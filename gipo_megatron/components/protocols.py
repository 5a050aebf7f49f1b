"""What each slot has to offer. A component is a dataclass; whatever has memory can be
checkpointed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gipo_megatron.roles import Actor, Stateful
from gipo_megatron.specs import HeadSpec
from gipo_megatron.types import Groups, Metrics, Prompts, Rollout, Scores, Weights


class Sampler(Protocol):
    temperature: float

    def sample(self, actor: Actor, prompts: Prompts, step: int) -> Rollout: ...


class Reward(Stateful, Protocol):
    def raw(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """(raw scores [B], their parts). Changes nothing, so evaluation may call it."""
        ...

    def score(self, rollout: Rollout) -> Scores:
        """Scores in three forms; advances the running moments, current batch included, non-finite
        scores left out."""
        ...


class GroupClassifier(Stateful, Protocol):
    beta_critic: float
    relabel: bool

    @property
    def head(self) -> HeadSpec | None:
        """The head to build on the critic's trunk; None builds none."""
        ...

    def assign(self, group_logits: Tensor | None, rollout: Rollout, scores: Scores) -> Groups:
        """Labels and the M global sums. Pure: calling it twice changes nothing."""
        ...

    def coefficients(self, groups: Groups) -> Tensor:
        """c_ig [B, M] of the linear group loss; zeros where nothing is learned."""
        ...

    def observe(self, groups: Groups, scores: Scores, probe_logits: Tensor | None) -> Metrics:
        """Advance the memory (which group is high) once an iteration; probe_logits [b, M] of this
        replica's fixed probe prompts."""
        ...


class VarianceRegulariser(Stateful, Protocol):
    def weights(self, groups: Groups) -> Weights: ...

    def observe(self, groups: Groups) -> None: ...


class KLController(Stateful, Protocol):
    def coefficients(self, groups: Groups) -> Tensor:
        """[B], the price of one nat of KL for each sequence."""
        ...

    def observe(self, groups: Groups, kl: float) -> Metrics:
        """Advance the memory; kl is the batch's global mean, nats per response."""
        ...


class Advantage(Protocol):
    def estimate(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(advantages, returns), both [B, T]."""
        ...
