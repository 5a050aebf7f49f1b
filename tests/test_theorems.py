"""What must hold exactly (algorithm.md 2.1, 2.2, 5.8, 5.10, 5.14)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.components import protocols
from gipo_megatron.components.groups import CriticHead, NoGroups
from gipo_megatron.components.kl import FixedKL, GroupAdaptiveKL
from gipo_megatron.components.variance import CVaR, GroupDRO, GroupVariance, NoVariance, ReturnVariance
from gipo_megatron.roles import SingleReplica
from gipo_megatron.types import Groups, Metrics, Rollout, Scores
from tests.small_ppo import make_ppo, scores_of, stored_rollout
from tests.torch_roles import TorchActor, TorchCritic, replica_rows, run_replicas

KINDS = ("mass", "uniform")
REGULARISERS: dict[str, Any] = {
    "none": NoVariance,
    "mass": lambda: GroupVariance(beta=0.3, min_weight=-100, max_weight=100),
    "ema": lambda: GroupVariance(beta=0.3, min_weight=-100, max_weight=100, return_ema=0.8),
    "return_variance": lambda: ReturnVariance(min_weight=-100, max_weight=100),
    "group_dro": lambda: GroupDRO(step=0.5, max_weight=100),
    "cvar": lambda: CVaR(dp=SingleReplica()),
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_groups(probs: Tensor, returns: Tensor, kind: str = "mass", high: int = 0) -> Groups:
    r, masses, mean, count = ops.group_returns(ops.group_sums(probs, returns))
    return Groups(probs, probs[:, high], returns, r, masses, mean, count, high, 1.0, kind)


def some_groups(kind: str = "mass", num_groups: int = 3, rows: int = 40) -> Groups:
    return make_groups(draw(1, rows, num_groups).softmax(-1), draw(2, rows).clamp(-3, 3), kind)


# --------------------------------------------------------------------------------------------- 2.2: the closed forms


def variance_of(probs: Tensor, returns: Tensor, kind: str) -> Tensor:
    """R_var written from the definition in algorithm.md, differentiable; shares nothing with ops."""
    masses = probs.sum(0)
    group = (probs * returns[:, None]).sum(0) / masses
    if kind == "uniform":
        return ((group - group.mean()) ** 2).sum() / probs.shape[1]
    return (masses / len(returns) * (group - returns.mean()) ** 2).sum()


def finite_difference(f: Any, x: Tensor, step: float = 1e-5) -> Tensor:
    slopes = torch.zeros_like(x)
    for index in range(x.numel()):
        up, down = x.clone().flatten(), x.clone().flatten()
        up[index] += step
        down[index] -= step
        slopes.view(-1)[index] = (f(up.view_as(x)) - f(down.view_as(x))) / (2 * step)
    return slopes


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("num_groups", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_stage_2_weights_are_the_gradient(kind: str, num_groups: int) -> None:
    """grad_theta (mean J - beta R_var) = mean_i w_i grad J_i, for the surrogate J_i = stop_grad(G_i) + sum_t (rho_t - 1) A_t."""
    beta, rows, length = 0.3, 24, 5
    groups = make_groups(draw(3, rows, num_groups).softmax(-1), draw(4, rows), kind)
    advantages, theta, inputs = draw(5, rows, length), draw(6, 4), draw(7, rows, length, 4)

    def trajectory_returns(parameters: Tensor) -> Tensor:
        logprobs = torch.tanh(inputs @ parameters) - 1
        ratio = torch.exp(logprobs - (torch.tanh(inputs @ theta) - 1).detach())
        return groups.sample_returns + ((ratio - 1) * advantages).sum(1)

    def objective(parameters: Tensor) -> Tensor:
        j = trajectory_returns(parameters)
        return j.mean() - beta * variance_of(groups.probs, j, kind)

    weights = GroupVariance(beta=beta, min_weight=-100, max_weight=100).weights(groups).raw
    parameters = theta.clone().requires_grad_()
    (exact,) = torch.autograd.grad(objective(parameters), parameters)
    (weighted,) = torch.autograd.grad((weights * trajectory_returns(parameters)).mean(), parameters)
    assert relative(weighted, exact) < 1e-9
    assert relative(weighted, finite_difference(objective, theta)) < 1e-8


@pytest.mark.parametrize("num_groups", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_stage_1_coefficients_are_the_gradient(kind: str, num_groups: int) -> None:
    """The linear loss mean_i sum_g c_ig p_ig has R_var's gradient in the logits."""
    rows = 24
    logits, returns = draw(8, rows, num_groups), draw(9, rows)
    groups = make_groups(logits.softmax(-1), returns, kind)
    coefficients = CriticHead(num_groups=num_groups, variance=kind, dp=SingleReplica()).coefficients(groups)
    free = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(variance_of(free.softmax(-1), returns, kind), free)
    (linear,) = torch.autograd.grad((coefficients * free.softmax(-1)).sum(1).mean(), free)
    assert relative(linear, exact) < 1e-9
    assert relative(linear, finite_difference(lambda x: variance_of(x.softmax(-1), returns, kind), logits)) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_the_logged_variance_is_the_definition(kind: str) -> None:
    g = some_groups(kind)
    value = ops.group_variance(g.returns, g.shares, g.mean_return, kind)
    assert float(value) == pytest.approx(float(variance_of(g.probs, g.sample_returns, kind)), rel=1e-12)


def test_the_papers_literal_performance_would_train_backwards() -> None:
    """2.1: 100 tokens of 0.9 nats, returns +-1, two trajectories in three good on easy prompts: the literal value ranks the groups backwards."""
    returns = torch.tensor([1.0] * 99 + [-1.0] + [-1.0] * 101 + [1.0] * 2, dtype=torch.float64)[: 100 + 100]
    returns = torch.cat([_with_mean(0.98), _with_mean(-1.02 + 0.0)])
    probs = torch.zeros(200, 2, dtype=torch.float64)
    probs[:100, 0] = probs[100:, 1] = 1
    literal = make_groups(probs, -0.9 * 100 * returns, "uniform")
    assert literal.returns.tolist() == pytest.approx([-88.2, 91.8])
    backwards = GroupVariance(beta=0.01, min_weight=-100, max_weight=100).weights(literal).raw
    assert (float(backwards[0]), float(backwards[-1])) == (pytest.approx(2.8), pytest.approx(-0.8))

    ours = GroupVariance(beta=0.01, min_weight=-100, max_weight=100).weights(make_groups(probs, returns, "uniform")).raw
    assert float(ours[0]) < 1 < float(ours[-1])


def _with_mean(mean: float) -> Tensor:
    return torch.full((100,), mean, dtype=torch.float64)
