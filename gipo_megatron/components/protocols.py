"""The interface of the component in each slot. (A reward is a subclass of reward.Reward.)

A component is a dataclass; its fields are its recipe keys. Some things are optional, and used where
a component has them:
- `needs`, a ClassVar: names of the roles that must be built for it, such as ("critic",);
- `needs_groups` and `makes_groups`, and `problems()` for keys that do not fit together: see
  registry.py;
- `min_responses`, a ClassVar: the least number of responses to a prompt;
- `observe(groups, kl) -> Metrics`: advance a memory once an iteration, after both updates;
- `state_dict()` and `load_state_dict(state)`: that memory, for checkpoints.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from gipo_megatron.metrics import Metrics
from gipo_megatron.roles import Actor, Trainable
from gipo_megatron.specs import HeadSpec, Sampling
from gipo_megatron.tensors import Tensor
from gipo_megatron.types import Groups, Prompts, Rollout, Rows, Weights


class Sampler(Protocol):
    correction_cap: float  # the share of tokens whose probability ratio is above it is logged
    temperature: float

    def start(self) -> None:
        """Start what responses need beside the actor; called before models are loaded."""
        ...

    def sample(self, actor: Actor, prompts: Prompts, step: int) -> Rollout:
        """Return the training responses of an iteration."""
        ...

    def respond(self, actor: Actor, prompts: Prompts, sampling: Sampling) -> Rollout:
        """Return responses drawn as `sampling` describes: held-out ones, or an evaluation's."""
        ...

    def token_weights(self, logprobs: Tensor, rollout: Rollout) -> Tensor:
        """Return the weight of each token in the policy's loss, [B, T]; logprobs [B, T] are the
        trainer's."""
        ...


class RolloutServer(Protocol):
    """A server that is given the actor's weights and samples from them. Collective over the whole
    world."""

    def respond(self, actor: Actor, prompts: Prompts, sampling: Sampling) -> Rollout: ...


class GroupClassifier(Protocol):
    @property
    def num_groups(self) -> int:
        """M"""
        ...

    @property
    def variance(self) -> str:
        """mass | uniform: the definition of R_var, for both stages."""
        ...

    @property
    def head(self) -> HeadSpec | None:
        """The head to build on the critic's trunk; None builds none."""
        ...

    def probs(self, logits: Tensor | None, values: Tensor | None, rollout: Rollout) -> Tensor:
        """Return labels p_ig [B, M]. logits [B, M] are the head's, None without a head; values [B,
        T] the critic's, None without a critic."""
        ...


class VarianceRegulariser(Protocol):
    def weights(self, groups: Groups) -> Weights: ...


class KLController(Protocol):
    def kl_coefficients(self, groups: Groups) -> Tensor:
        """Return the KL coefficient of each sequence, [B]."""
        ...


class Advantage(Protocol):
    def estimate(
        self, rewards: Tensor, values: Tensor | None, rollout: Rollout
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and returns (the critic's targets), both [B, T].

        rewards [B, T]: per token, the KL penalty included. values [B, T]: the critic's; None
        without a critic.
        """
        ...


@runtime_checkable
class Observer(Protocol):
    def observe(self, groups: Groups, kl: float) -> Metrics:
        """Advance the memory; kl is the batch's global mean, nats per response."""
        ...


@runtime_checkable
class OwnHead(Trainable, Protocol):
    """A group classifier with a head of its own, not on the critic."""

    entropy: float  # weight of the labels' entropy beside R_var
    input: str  # prompt | trajectory

    def logits(self, rows: Rows) -> Tensor:
        """Return group logits, [B, M]."""
        ...
