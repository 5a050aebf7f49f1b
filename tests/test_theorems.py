"""What must hold exactly (algorithm.md 2.1, 2.2, 5.8, 5.10, 5.14)."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.components.advantage import GeneralisedAdvantage
from gipo_megatron.components.groups import CriticHead, LabelledGroups, NoGroups
from gipo_megatron.components.kl import FixedKL, GroupAdaptiveKL
from gipo_megatron.components.protocols import Observer
from gipo_megatron.components.tracker import GroupTracker, group_loss_coefficients
from gipo_megatron.components.variance import (
    CVaR,
    GroupDRO,
    GroupVariance,
    NoVariance,
    ReturnVariance,
)
from gipo_megatron.local.replicas import replica_rows, run_replicas
from gipo_megatron.local.roles import TorchActor, TorchCritic
from gipo_megatron.metrics import Metrics
from gipo_megatron.roles import SingleReplica
from gipo_megatron.types import Groups, Rollout
from tests.small_ppo import SOURCES, make_ppo, scores_of, stored_rollout

KINDS = ("mass", "uniform")
REGULARISERS: dict[str, Any] = {
    "none": NoVariance,
    "mass": lambda: GroupVariance(beta=0.3, min_weight=-100, max_weight=100),
    "return_variance": lambda: ReturnVariance(min_weight=-100, max_weight=100),
    "group_dro": lambda: GroupDRO(step=0.5, max_weight=100),
    "cvar": lambda: CVaR(dp=SingleReplica()),
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_groups(probs: Tensor, returns: Tensor, kind: str = "mass", high: int = 0) -> Groups:
    r, masses, mean, count = ops.group_means(ops.group_sums(probs, returns))
    return Groups(probs, probs[:, high], returns, r, masses, mean, count, high, 1.0, kind)


def some_groups(kind: str = "mass", num_groups: int = 3, rows: int = 40) -> Groups:
    return make_groups(draw(1, rows, num_groups).softmax(-1), draw(2, rows).clamp(-3, 3), kind)


# ---------------------------------------------------------------------------- 2.2: the closed forms


def variance_of(probs: Tensor, returns: Tensor, kind: str) -> Tensor:
    """R_var written from the definition in algorithm.md, differentiable; shares nothing with
    ops."""
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
    """grad_theta (mean J - beta R_var) = mean_i w_i grad J_i, for the surrogate J_i =
    stop_grad(G_i) + sum_t (rho_t - 1) A_t."""
    beta, rows, length = 0.3, 24, 5
    groups = make_groups(draw(3, rows, num_groups).softmax(-1), draw(4, rows), kind)
    advantages, theta, inputs = draw(5, rows, length), draw(6, 4), draw(7, rows, length, 4)

    def trajectory_returns(parameters: Tensor) -> Tensor:
        logprobs = torch.tanh(inputs @ parameters) - 1
        ratio = torch.exp(logprobs - (torch.tanh(inputs @ theta) - 1).detach())
        return groups.sample_scores + ((ratio - 1) * advantages).sum(1)

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
    coefficients = group_loss_coefficients(groups, groups.probs)
    free = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(variance_of(free.softmax(-1), returns, kind), free)
    (linear,) = torch.autograd.grad((coefficients * free.softmax(-1)).sum(1).mean(), free)
    assert relative(linear, exact) < 1e-9
    assert (
        relative(
            linear, finite_difference(lambda x: variance_of(x.softmax(-1), returns, kind), logits)
        )
        < 1e-8
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_logged_variance_is_the_definition(kind: str) -> None:
    g = some_groups(kind)
    value = ops.group_variance(g.group_means, g.shares, g.mean_score, kind)
    assert float(value) == pytest.approx(
        float(variance_of(g.probs, g.sample_scores, kind)), rel=1e-12
    )


def test_the_papers_literal_performance_would_train_backwards() -> None:
    """2.1: returns +-1, 100 tokens of 0.88 nats (easy) and 0.92 nats (hard): sum log pi R is -88
    and +92, the weights 2.8 and -0.8."""
    returns = torch.tensor([1.0] * 50 + [-1.0] * 50, dtype=torch.float64)
    nats = torch.tensor([0.88] * 50 + [0.92] * 50, dtype=torch.float64)
    probs = torch.stack([returns > 0, returns < 0], 1).double()
    unclamped = GroupVariance(beta=0.01, min_weight=-100, max_weight=100)
    literal = make_groups(probs, -100 * nats * returns, "uniform")
    assert literal.group_means.tolist() == pytest.approx([-88, 92])
    assert unclamped.weights(literal).raw[[0, -1]].tolist() == pytest.approx([2.8, -0.8])

    ours = unclamped.weights(make_groups(probs, returns, "uniform")).raw
    assert ours[[0, -1]].tolist() == pytest.approx([0.98, 1.02])


# -------------------------------------------------------------------------- 5.8, 5.10, 5.14: limits


@pytest.mark.parametrize("name", list(REGULARISERS))
@pytest.mark.parametrize("kind", KINDS)
def test_mean_weight_is_one_before_clamping(name: str, kind: str) -> None:
    regulariser = REGULARISERS[name]()
    for seed in range(3):  # whatever it remembers of other batches
        groups = make_groups(draw(seed, 40, 3).softmax(-1), draw(10 + seed, 40), kind)
        weights = regulariser.weights(groups)
        assert float(weights.raw.mean()) == pytest.approx(1.0, abs=1e-12)
        if isinstance(regulariser, Observer):
            regulariser.observe(groups, 0.0)


@pytest.mark.parametrize("name", list(REGULARISERS))
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_group_is_finite(name: str, kind: str) -> None:
    """And where the weights come from groups, they are 1: an empty group's return says nothing."""
    probs = torch.zeros(40, 2, dtype=torch.float64)
    probs[:, 0] = 1
    groups = make_groups(probs, draw(2, 40), kind)
    weights = REGULARISERS[name]().weights(groups)
    assert torch.isfinite(weights.raw).all()
    assert float(weights.raw.mean()) == pytest.approx(1.0, abs=1e-12)
    if name in ("mass", "group_dro"):
        assert (weights.values == 1).all()
    coefficients = group_loss_coefficients(groups, groups.probs)
    logits = torch.tensor([[40.0, -40.0]] * 40, dtype=torch.float64, requires_grad=True)
    (coefficients * logits.softmax(-1)).sum(1).mean().backward()
    assert torch.isfinite(coefficients).all()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_group_is_weight_one(kind: str) -> None:
    groups = make_groups(torch.ones(17, 1), draw(3, 17).float(), kind)
    assert (GroupVariance(beta=5.0).weights(groups).values == 1).all()
    assert (GroupDRO(step=5.0).weights(groups).values == 1).all()
    assert float(groups.gap) == 0


@pytest.mark.parametrize("name", ["mass", "group_dro"])
@pytest.mark.parametrize("kind", KINDS)
def test_permuting_labels_changes_nothing(name: str, kind: str) -> None:
    groups, order = some_groups(kind), [2, 0, 1]
    permuted = make_groups(groups.probs[:, order], groups.sample_scores, kind, high=order.index(0))
    torch.testing.assert_close(
        ops.group_variance(groups.group_means, groups.shares, groups.mean_score, kind),
        ops.group_variance(permuted.group_means, permuted.shares, permuted.mean_score, kind),
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(
        REGULARISERS[name]().weights(groups).raw,
        REGULARISERS[name]().weights(permuted).raw,
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(groups.gap, permuted.gap, rtol=1e-12, atol=0)


def test_negative_weights_clip_pessimistically() -> None:
    """For w < 0 the loss is that of the advantage w A: an upper bound of the unclipped one, flat
    only where moving on would gain."""
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5], dtype=torch.float64)
    for weight, advantage in ((-0.5, 1.0), (-0.5, -1.0), (2.0, 1.0)):
        weighted = torch.full_like(ratio, weight * advantage)
        logprobs = ratio.log().requires_grad_()
        loss = ops.clipped_surrogate(logprobs, torch.zeros_like(ratio), weighted, 0.2)
        assert (loss >= -ratio * weighted - 1e-12).all()
        (slope,) = torch.autograd.grad(loss.sum(), logprobs)
        gained = ratio > 1.2 if weight * advantage > 0 else ratio < 0.8
        assert ((slope == 0) == gained).all()
    outside = torch.tensor([1.5], dtype=torch.float64)
    inside = ops.clipped_surrogate(
        outside.log(),
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([-0.5], dtype=torch.float64),
        0.2,
    )
    afterwards = -0.5 * ops.clipped_surrogate(
        outside.log(), torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 0.2
    )
    assert float(inside) == pytest.approx(0.75)
    # a weight applied after the clip would stop pulling back
    assert float(afterwards) == pytest.approx(0.6)


# ------------------------------------------------------------------------- 2.3: where training ends


def policy_gradient(theta: Tensor, reward: Tensor, reference: Tensor, eta: float) -> Tensor:
    """sum_a pi(a) w (r(a) - coef log pi(a)/pi_ref(a)) grad log pi(a) of each prompt, with the
    weights and coefficients of the components; rewards and gradients are exact sums over actions.
    Autograd sees log pi alone, as in PPO."""
    pi = theta.softmax(-1)
    returns = (pi * reward).sum(1).detach()
    groups = make_groups(HALVES, returns - returns.mean())
    weights = GroupVariance(beta=0.4).weights(groups)
    coefficients = FixedKL(eta).kl_coefficients(groups) / weights.kl_divisor
    log_ratio = theta.log_softmax(-1) - reference.log_softmax(-1)
    gain = weights.values[:, None] * (reward - coefficients[:, None] * log_ratio)
    surrogate = (pi.detach() * gain.detach() * theta.log_softmax(-1)).sum()
    (gradient,) = torch.autograd.grad(surrogate, theta)
    return gradient


HALVES = torch.eye(2, dtype=torch.float64).repeat_interleave(3, 0)  # six prompts, two groups


def test_price_over_weight_leaves_the_weighted_reward_and_the_whole_kl() -> None:
    """The gradient is that of sum_x w E[r] - eta KL(pi || ref), w held."""
    reward, reference = draw(1, 6, 5) + HALVES[:, :1], draw(2, 6, 5)
    theta = draw(3, 6, 5).requires_grad_()
    pi = theta.softmax(-1)
    kl = (pi * (theta.log_softmax(-1) - reference.log_softmax(-1))).sum(1)
    returns = (pi * reward).sum(1)
    groups = make_groups(HALVES, (returns - returns.mean()).detach())
    weights = GroupVariance(beta=0.4).weights(groups).values
    assert (weights - 1).abs().min() > 0.05
    (exact,) = torch.autograd.grad((weights * returns - 0.3 * kl).sum(), theta)
    assert relative(policy_gradient(theta, reward, reference, 0.3), exact) < 1e-9


@dataclass
class SeenRewards:
    """An advantage estimator that keeps the rewards of the page."""

    inner: GeneralisedAdvantage
    needs: ClassVar[tuple[str, ...]] = ("critic",)

    def estimate(
        self, rewards: Tensor, values: Tensor | None, batch: Rollout
    ) -> tuple[Tensor, Tensor]:
        self.found = rewards
        return self.inner.estimate(rewards, values, batch)


@pytest.mark.parametrize("weigh_kl", [False, True])
def test_the_pages_reward_times_the_weight(weigh_kl: bool) -> None:
    """w r_t = w s [last token] - eta log pi / pi_ref with the price over the weight; with a shared
    price w multiplies the penalty, too."""
    seen, eta = SeenRewards(GeneralisedAdvantage(dp=SingleReplica())), 0.3
    regulariser = GroupVariance(beta=0.5, weigh_kl=weigh_kl)
    groups = LabelledGroups(sources=SOURCES)
    ppo = make_ppo(SingleReplica(), groups, regulariser, FixedKL(eta), advantage=seen)
    for step in range(3):
        ppo.step(step)
    rollout = stored_rollout(ppo, 3)
    log_ratio = ppo.actor.logprobs(rollout).logprobs - ppo.reference.logprobs(rollout).logprobs
    shaped = deepcopy(ppo.reward).score(rollout).shaped
    w = torch.tensor([row["weight"] for row in ppo.step(3).samples])[:, None]
    position = torch.arange(rollout.mask.shape[1])
    score = torch.where(position == rollout.lengths[:, None] - 1, shaped[:, None], 0.0)
    kl = torch.where(rollout.mask, log_ratio, 0.0)
    expected = w * score - eta * (w if weigh_kl else 1.0) * kl
    torch.testing.assert_close(w * seen.found, expected, rtol=0, atol=1e-6)
    assert (w - 1).abs().max() > 0.05 and kl.abs().max() > 0.05


def test_a_weighted_kl_penalty_does_not_move_the_optimum() -> None:
    """At the optimum of PPO with KL, pi = ref e^(r / eta) / Z, the gradient of w (r - eta KL) is 0
    for any w; that of w r - eta KL is not."""
    reward, reference, eta = draw(1, 6, 5) + HALVES[:, :1], draw(2, 6, 5), 0.3
    theta = (reference.log_softmax(-1) + reward / eta).requires_grad_()
    pi = theta.softmax(-1)
    log_ratio = (theta.log_softmax(-1) - reference.log_softmax(-1)).detach()
    weights = torch.tensor([0.7] * 3 + [1.3] * 3, dtype=torch.float64)[:, None]
    shared = (pi.detach() * weights * (reward - eta * log_ratio) * theta.log_softmax(-1)).sum()
    (gradient,) = torch.autograd.grad(shared, theta)
    assert float(gradient.abs().max()) < 1e-12
    assert float(policy_gradient(theta, reward, reference, eta).abs().max()) > 1e-3


# ------------------------------------------------------------------- 5.14: PPO with KL, bit for bit


@dataclass
class Certain:
    """A KL controller that sees p_high = 1 for every sequence."""

    inner: GroupAdaptiveKL

    def kl_coefficients(self, groups: Groups) -> Tensor:
        certain = replace(groups, high_prob=torch.ones_like(groups.high_prob))
        return self.inner.kl_coefficients(certain)

    def observe(self, groups: Groups, kl: float) -> Metrics:
        return self.inner.observe(groups, kl)


def all_weights(ppo: PPO) -> list[Tensor]:
    actor, critic = ppo.actor, ppo.critic
    assert isinstance(actor, TorchActor)
    assert isinstance(critic, TorchCritic)
    return [p.detach() for p in [*actor.parameters, *critic.parameters]]


def run(
    *parts: Any, steps: int = 4, **settings: Any
) -> tuple[list[dict[str, float]], list[Tensor]]:
    ppo = make_ppo(SingleReplica(), *parts, **settings)
    rows = [
        {name: m.result() for name, m in ppo.step(step).metrics.items()} for step in range(steps)
    ]
    return rows, all_weights(ppo)


def assert_same_training(
    a: tuple[list[dict[str, float]], list[Tensor]],
    b: tuple[list[dict[str, float]], list[Tensor]],
    free: tuple[str, ...],
) -> None:
    """Weights equal bit by bit, and every metric both have, but those named by a prefix in
    `free`."""
    compared = 0
    for row_a, row_b in zip(a[0], b[0], strict=True):
        for name in sorted(row_a.keys() & row_b.keys()):
            if not name.startswith(free):
                assert row_a[name] == row_b[name] or row_a[name] != row_a[name], name
                compared += 1
    assert compared > 100
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    assert len(a[1]) == 8


def detached() -> CriticHead:
    return CriticHead(detach_trunk=True, lr=0.05)


def plain_ppo() -> tuple[list[dict[str, float]], list[Tensor]]:
    return run(NoGroups(), NoVariance(), FixedKL(0.05))


@pytest.mark.parametrize("normalise", [True, False])
def test_gipo_with_its_terms_off_is_ppo_with_kl(normalise: bool) -> None:
    """beta_policy = 0, p_high = 1, detach_trunk: bit for bit."""
    controller = GroupAdaptiveKL(eta=0.05, normalise=normalise, dp=SingleReplica())
    # the ramp is fully up: it is p_high = 1 that makes them equal
    controller.load_state_dict({"leads": {0: 0.15, 1: -0.15}, "level": 0.05})
    gipo = run(detached(), GroupVariance(beta=0.0), Certain(controller))
    assert_same_training(
        plain_ppo(), gipo, free=("groups/", "source/easy/p_high", "source/hard/p_high")
    )


def test_an_observer_changes_nothing() -> None:
    assert_same_training(
        plain_ppo(),
        run(detached(), NoVariance(), FixedKL(0.05)),
        free=("groups/", "source/easy/p_high", "source/hard/p_high"),
    )


def test_gipo_with_its_terms_on_is_not_ppo() -> None:
    """The comparison above can fail."""
    on = run(detached(), GroupVariance(beta=0.3), FixedKL(0.05))
    assert not all(torch.equal(x, y) for x, y in zip(plain_ppo()[1], on[1], strict=True))


@pytest.mark.parametrize("detach", [True, False])
def test_a_detached_head_leaves_the_trunks_gradient_alone(detach: bool) -> None:
    classifier = CriticHead(detach_trunk=detach, init_std=0.5)
    gradients = []
    for head in (None, classifier.head):
        ppo = make_ppo(SingleReplica(), classifier, NoVariance(), FixedKL(0.05))
        rollout = stored_rollout(ppo)
        scores = ppo.reward.score(rollout)
        logits = ppo._criticise(rollout)[1]
        groups = ppo.tracker.measure(classifier.probs(logits, None, rollout), scores)
        critic = TorchCritic(12, head, hidden=16)
        output = critic.forward(rollout)
        loss = ((output.values - 1) ** 2).sum()
        if output.group_logits is not None:
            loss = (
                loss
                - (
                    group_loss_coefficients(groups, groups.probs) * output.group_logits.softmax(-1)
                ).sum()
            )
        loss.backward()
        gradients.append([p.grad for p in critic.parameters])
    same = [torch.equal(a, b) for a, b in zip(*gradients, strict=True)]  # type: ignore[arg-type]
    assert len(same) == 4
    assert all(same) is detach


# ---------------------------------------------------------------------------------------- any split


@pytest.mark.parametrize("size", [2, 4])
def test_a_stored_rollout_gives_the_same_numbers_on_any_number_of_replicas(size: int) -> None:
    one = SingleReplica()
    whole = make_ppo(one, CriticHead(), NoVariance(), FixedKL())
    rollout = stored_rollout(whole)
    raw = whole.reward.raw(rollout)[0]
    logits = draw(20, len(rollout), 2)

    def numbers(dp: Any) -> dict[str, Tensor]:
        rows, score = replica_rows(rollout, dp), raw[dp.rank :: dp.size]
        ppo = make_ppo(dp, CriticHead(), NoVariance(), FixedKL())
        scores = ppo.reward.scores(score, {}, ~rows.finished)
        probs = ppo.group_classifier.probs(logits[dp.rank :: dp.size], None, rows)
        groups = ppo.tracker.measure(probs, scores)
        controller = GroupAdaptiveKL(dp=dp)
        controller.load_state_dict({"leads": {0: 0.1, 1: -0.1}, "level": 0.05})
        found = {
            "R_g": groups.group_means,
            "m_g": groups.masses,
            "shaped": scores.shaped,
            "coef": controller.kl_coefficients(groups),
        }
        for name, make in {**REGULARISERS, "cvar": lambda: CVaR(dp=dp)}.items():
            found[name] = make().weights(groups).raw
        return found

    expected = numbers(one)
    for rank, found in enumerate(run_replicas(size, numbers)):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            reference = expected[name] if name in ("R_g", "m_g") else expected[name][rank::size]
            torch.testing.assert_close(
                value, reference, rtol=1e-6, atol=1e-6, msg=f"{name} on replica {rank} of {size}"
            )


def test_p_high_of_three_groups_is_the_expected_rank() -> None:
    """M > 2: p_high is the expected normalised rank; the lowest group counts 0, the middle one
    half, the high one 1."""
    tracker = GroupTracker(3)
    tracker.load_state_dict({**tracker.state_dict(), "means": [0.2, 0.9, 0.5], "high": 1})
    probs = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    groups = tracker.measure(probs, scores_of(torch.ones(1, dtype=torch.float64)))
    assert float(groups.high_prob) == pytest.approx(0.2 * 1 + 0.1 * 0.5)
