"""Advantages: from token rewards and values, or from the other responses to the same prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from gipo_megatron import ops
from gipo_megatron.registry import from_runtime, register
from gipo_megatron.roles import DataParallel, gather_rows
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Rollout


@final
@register("advantage", "gae")
@dataclass
class GeneralisedAdvantage:
    """GAE(gamma, lambda), whitened once over all response tokens of the global batch, never again
    per minibatch."""

    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda: 0 = one-step, 1 = Monte Carlo
    whiten: bool = True  # advantages get mean 0, variance 1 over the global batch

    dp: DataParallel = from_runtime("dp")

    needs: ClassVar[tuple[str, ...]] = ("critic",)

    def estimate(
        self, rewards: Tensor, values: Tensor | None, rollout: Rollout
    ) -> tuple[Tensor, Tensor]:
        """Return (advantages, returns), both [B, T]; returns are A + V before whitening."""
        assert values is not None, "gae needs a critic"
        advantages, returns = ops.gae(rewards, values, rollout.mask, self.gamma, self.lam)
        if self.whiten:
            advantages = ops.whiten(advantages, rollout.mask, self.dp.sum)
        return advantages, returns


@dataclass(frozen=True)
class Siblings:
    """All responses to each row's prompt, this row's included, over all replicas; float64 [B]."""

    count: Tensor
    total: Tensor  # sum of their returns
    std: Tensor  # of their returns, with count - 1 in the denominator


def siblings(returns: Tensor, rollout: Rollout, dp: DataParallel) -> Siblings:
    """Gather (prompt_id, return) of every replica: the responses to one prompt are dealt to
    different ones."""
    prompt, everyone = gather_rows(rollout.prompt_id, dp), gather_rows(returns, dp)
    same = (rollout.prompt_id[:, None] == prompt).double()  # [B, N]
    count, total = same.sum(1), (same * everyone).sum(1)
    assert bool((count > 1).all()), "batch.responses is checked to be at least 2"
    squares = same * (everyone - (total / count)[:, None]).square()
    return Siblings(count, total, (squares.sum(1) / (count - 1)).sqrt())


def _on_every_token(advantages: Tensor, rewards: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return advantages [B] repeated over the response, and the rewards from each token on (the
    targets of a critic, where there is one), both [B, T]."""
    mask = rollout.mask
    rewards = torch.where(mask, rewards, 0.0)
    to_go = torch.where(mask, rewards.flip(1).cumsum(1).flip(1), 0.0)
    return torch.where(mask, advantages[:, None].to(rewards.dtype), 0.0), to_go


@final
@register("advantage", "rloo")
@dataclass
class LeaveOneOut:
    """A_i = R_i - mean of R over the other responses to the prompt, the same for all tokens
    (Ahmadian et al. 2024).

    R_i = sum_t r_t is the shaped score minus the KL penalty. It needs no critic.
    """

    dp: DataParallel = from_runtime("dp")

    min_responses: ClassVar[int] = 2

    def estimate(
        self, rewards: Tensor, values: Tensor | None, rollout: Rollout
    ) -> tuple[Tensor, Tensor]:
        returns = ops.sequence_sum(rewards, rollout.mask).double()
        all_of = siblings(returns, rollout, self.dp)
        baseline = (all_of.total - returns) / (all_of.count - 1)
        return _on_every_token(returns - baseline, rewards, rollout)


@final
@register("advantage", "grpo")
@dataclass
class GroupNormalised:
    """A_i = (R_i - mean R) / (std R + 1e-4) over the responses to the prompt, the same for all
    tokens (Shao et al. 2024).

    R_i = sum_t r_t is the shaped score minus the KL penalty (the paper has its KL term in the loss
    instead). It needs no critic.
    """

    dp: DataParallel = from_runtime("dp")

    min_responses: ClassVar[int] = 2
    eps: ClassVar[float] = 1e-4

    def estimate(
        self, rewards: Tensor, values: Tensor | None, rollout: Rollout
    ) -> tuple[Tensor, Tensor]:
        returns = ops.sequence_sum(rewards, rollout.mask).double()
        all_of = siblings(returns, rollout, self.dp)
        advantages = (returns - all_of.total / all_of.count) / (all_of.std + self.eps)
        return _on_every_token(advantages, rewards, rollout)
