"""Truncated importance weights between the sampler and the trainer (algorithm.md 5.7)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gipo_megatron.algorithms import ppo_metrics
from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.components.groups import CriticHead, NoGroups
from gipo_megatron.components.kl import FixedKL
from gipo_megatron.components.rollout import Rollouts
from gipo_megatron.components.variance import GroupVariance, NoVariance
from gipo_megatron.errors import UserError
from gipo_megatron.local.replicas import run_replicas
from gipo_megatron.local.roles import TorchActor, backward
from gipo_megatron.metrics import Metric
from gipo_megatron.roles import SingleReplica
from gipo_megatron.specs import Sampling
from gipo_megatron.telemetry.metrics import reduce_metrics
from gipo_megatron.types import Experience, Prompts, Rollout, TokenStats, Update
from tests.small_ppo import BATCH, RESPONSES, make_ppo, rollout_of

DP = SingleReplica()


@dataclass
class Exact(Rollouts):
    """A sampler whose log-probs are the trainer's, bit for bit."""

    def respond(self, actor: Any, prompts: Prompts, sampling: Sampling) -> Rollout:
        rollout = actor.generate(prompts, sampling)
        return replace(rollout, generation_logprobs=actor.logprobs(rollout).logprobs)


@dataclass
class Hot(Rollouts):
    """A sampler that draws from softmax(logits / 2), where the trainer's is softmax(logits)."""

    def respond(self, actor: Any, prompts: Prompts, sampling: Sampling) -> Rollout:
        return actor.generate(prompts, replace(sampling, temperature=2.0))


@dataclass
class Silent(Rollouts):
    """A sampler without log-probs."""

    def respond(self, actor: Any, prompts: Prompts, sampling: Sampling) -> Rollout:
        return replace(actor.generate(prompts, sampling), generation_logprobs=None)


def page(kind: type[Rollouts], dp: Any = DP, micro_batch: int = 0, **keys: Any) -> PPO:
    made = make_ppo(dp, CriticHead(lr=0.02), GroupVariance(beta=0.3), FixedKL(), micro_batch)
    made.rollout = kind(data_max_response=RESPONSES, seed=3, **keys)
    return made


def first_experience(made: PPO) -> tuple[Experience, Tensor]:
    """The rows of the actor's first optimizer step, and the advantages that were estimated."""
    seen: list[Experience] = []
    estimates: list[Tensor] = []
    estimate = made.advantage.estimate

    def record(*found: Any) -> tuple[Tensor, Tensor]:
        advantages, returns = estimate(*found)
        estimates.append(advantages)
        return advantages, returns

    def update(*parts: Any) -> Update:
        seen.append(parts[0][0])
        return Update({})

    made.advantage.estimate = record  # type: ignore[method-assign]
    made.actor.update = update  # type: ignore[method-assign]
    made.step(0)
    assert len(seen) == 4 and len(estimates) == 1
    return seen[0], estimates[0]


# --------------------------------------------------------------------------------- weights by hand


def test_weights_by_hand() -> None:
    """Ratios 1.5 and 4, the second above the cap; the prompt's token has weight 1."""
    rollout = replace(
        rollout_of(["a"]), generation_logprobs=torch.tensor([[7.0, -1.0, math.log(0.2)]])
    )
    logprobs = torch.tensor([[0.0, -1.0 + math.log(1.5), math.log(0.8)]])
    found = Rollouts(correction="truncated").token_weights(logprobs, rollout)
    assert found.tolist() == [pytest.approx([1.0, 1.5, 2.0])]
    wide = Rollouts(correction="truncated", correction_cap=10.0)
    assert wide.token_weights(logprobs, rollout).tolist() == [pytest.approx([1.0, 1.5, 4.0])]
    assert torch.equal(Rollouts().token_weights(logprobs, rollout), torch.ones(1, 3))


def test_metrics_by_hand() -> None:
    """Ratios 1 and 3: (1 + 3)² / (2 (1 + 9)) = 0.8, and one of two tokens is above 2."""
    rollout = replace(
        rollout_of(["a"]), generation_logprobs=torch.tensor([[0.0, -1.0, math.log(0.2)]])
    )
    logprobs = torch.tensor([[0.0, -1.0, math.log(0.6)]])
    found = ppo_metrics.rollout_metrics(rollout, logprobs, 2.0, DP)
    assert found["rollout/effective_sample_size"].result() == pytest.approx(0.8)
    assert found["rollout/capped"].result() == 0.5
    assert found["rollout/logprob_gap_mean"].result() == pytest.approx(math.log(3) / 2)
    bare = ppo_metrics.rollout_metrics(rollout_of(["a"]), logprobs, 2.0, DP)
    assert not [name for name in bare if "gap" in name or "effective" in name or "capped" in name]


def test_effective_sample_sizes_add_over_parts_and_do_not_overflow() -> None:
    """(1 + 2 + 3 + 4)² / (4 · 30) = 5/6; equal weights count whole; e^100 is beyond float32."""
    parts = [Metric.effective_sample_size(torch.tensor(x)) for x in ([1.0, 2.0], [3.0, 4.0])]
    assert parts[0].merge(parts[1]).result() == pytest.approx(5 / 6)
    assert Metric.effective_sample_size(torch.full((7,), 0.3)).result() == pytest.approx(1)
    assert math.isnan(Metric.effective_sample_size(torch.zeros(0)).result())
    rollout = replace(rollout_of(["a"]), generation_logprobs=torch.tensor([[0.0, -100.0, -1.0]]))
    found = ppo_metrics.rollout_metrics(rollout, torch.tensor([[0.0, 0.0, -1.0]]), 2.0, DP)
    assert found["rollout/effective_sample_size"].result() == pytest.approx(0.5)


def test_a_correction_without_log_probs_is_an_error() -> None:
    with pytest.raises(UserError, match="gives no log-probs") as caught:
        page(Silent, correction="truncated").step(0)
    assert caught.value.where == "algorithm.rollout.correction"
    assert "rollout/logprob_gap_mean" not in page(Silent).step(0).metrics


# -------------------------------------------------------------------------------- limits that hold


def test_without_a_correction_the_advantages_are_the_estimated_ones() -> None:
    """Bit for bit, for a sampler with a gap."""
    batch, estimated = first_experience(page(Hot))
    assert torch.equal(batch.advantages, estimated[: BATCH // 2])


def test_a_correction_of_no_gap_changes_nothing() -> None:
    """Three iterations, bit for bit: metrics and weights."""
    pages = [page(Exact), page(Exact, correction="truncated")]
    for step in range(3):
        a, b = (reduce_metrics(made.step(step).metrics, DP) for made in pages)
        assert len(a) > 50 and a["rollout/logprob_gap_max"] == 0 and repr(a) == repr(b)
    assert a["rollout/effective_sample_size"] == 1 and a["rollout/capped"] == 0
    actors = [made.actor for made in pages]
    assert all(isinstance(actor, TorchActor) for actor in actors)
    assert all(torch.equal(p, q) for p, q in zip(*(x.parameters for x in actors), strict=True))  # type: ignore[attr-defined]


def test_weights_are_in_the_advantages_after_whitening() -> None:
    made = page(Hot, correction="truncated", correction_cap=1.2)
    batch, estimated = first_experience(made)
    rollout = batch.rollout
    assert rollout.generation_logprobs is not None
    capped = 0
    for b, t in rollout.mask.nonzero().tolist():
        gap = float(batch.logprobs[b, t] - rollout.generation_logprobs[b, t])
        expected = float(estimated[b, t]) * min(math.exp(gap), 1.2)
        assert float(batch.advantages[b, t]) == pytest.approx(expected, rel=1e-5)
        capped += math.exp(gap) > 1.2
    assert 0 < capped < int(rollout.mask.sum())


# ------------------------------------------------------------------------------- what is estimated


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_response(p: Tensor, q: Tensor) -> tuple[Rollout, Tensor]:
    """All responses of two tokens, as a sampler q would draw them, and the trainer's log-probs.

    p, q: [1 + V, V], the first token's distribution, and the second's after each first one.
    """
    pairs = list(itertools.product(range(len(p[0])), repeat=2))
    first, second = (torch.tensor(x) for x in zip(*pairs, strict=True))
    zeros = torch.zeros(len(pairs), dtype=torch.float64)
    theirs, ours = (torch.stack([zeros, x[0, first], x[1 + first, second]], 1) for x in (q, p))
    rollout = rollout_of(["a"] * len(pairs))
    tokens = torch.stack([zeros.long(), first, second], 1)
    return replace(rollout, tokens=tokens, generation_logprobs=theirs), ours


@pytest.mark.parametrize("cut", [False, True])
def test_weighted_tokens_of_the_sampler_estimate_the_trainers_mean(cut: bool) -> None:
    """By brute force at every state: the mean of w f over the sampler is that of f over the
    trainer; with top-k, that of f over the tokens that the sampler can draw."""
    size = 4
    p, logits, f = draw(1, 1 + size, size).log_softmax(-1), draw(2, 1 + size, size), draw(3, 16)
    if cut:
        logits = logits.masked_fill(logits < logits.topk(2).values[:, -1:], -torch.inf)
    q = logits.log_softmax(-1)
    rollout, ours = every_response(p, q)
    weights = Rollouts(correction="truncated", correction_cap=1e9).token_weights(ours, rollout)
    assert rollout.generation_logprobs is not None
    theirs, f = rollout.generation_logprobs.exp(), f.reshape(size, size)
    inside = q.isfinite()
    drawn = torch.where(theirs > 0, theirs * weights, 0.0).reshape(size, size, 3)
    for a in range(size):
        expected = (p[1 + a].exp() * inside[1 + a] * f[a]).sum()
        assert float((drawn[a, :, 2] * f[a]).sum()) == pytest.approx(float(expected))
    # the first token, with a function of it alone
    expected = (p[0].exp() * inside[0] * f[:, 0]).sum()
    assert float((drawn[:, 0, 1] * f[:, 0]).sum()) == pytest.approx(float(expected))
    plain = (q[0].exp() * f[:, 0]).sum()  # without weights it is another number
    assert abs(float(plain - (p[0].exp() * f[:, 0]).sum())) > 0.05


def test_a_cap_estimates_the_smaller_of_two_measures() -> None:
    """sum q min(p / q, c) f = sum min(p, c q) f."""
    p, q, f = draw(1, 5, 4).log_softmax(-1), draw(2, 5, 4).log_softmax(-1), draw(3, 4)
    rollout, ours = every_response(p, q)
    weights = Rollouts(correction="truncated", correction_cap=1.5).token_weights(ours, rollout)
    found = (q[0].exp() * weights.reshape(4, 4, 3)[:, 0, 1] * f).sum()
    expected = sum(
        min(float(x), 1.5 * float(y)) * float(z)
        for x, y, z in zip(p[0].exp(), q[0].exp(), f, strict=True)
    )
    assert float(found) == pytest.approx(expected)
    assert (p[0] - q[0]).exp().max() > 1.5


def test_the_expected_gradient_is_the_trainers() -> None:
    """One token, each drawn q_a of the time: the mean gradient of the loss is that of
    -sum_a pi(a) A_a, although nothing is drawn from pi."""
    size = 5
    logits, q = draw(1, size).requires_grad_(), draw(2, size).log_softmax(-1)
    gain = draw(3, size)
    rollout = replace(
        rollout_of(["a"] * size),
        mask=torch.tensor([[False, True, False]] * size),
        generation_logprobs=torch.stack([0 * q, q, 0 * q], 1),
    )
    at = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    live = logits.log_softmax(-1)[:, None] * at
    old = live.detach()
    made = make_ppo(DP, NoGroups(), NoVariance(), FixedKL())
    gradients = []
    for sampler in (Rollouts(correction="truncated", correction_cap=1e9), Rollouts()):
        advantages = gain[:, None] * sampler.token_weights(old, rollout)
        nothing = torch.zeros(size, 1, dtype=torch.float64)
        batch = Experience(
            rollout, old, None, advantages, advantages, q.exp(), nothing + 1, nothing
        )
        total, unit = made.actor_loss(TokenStats(live, None), batch).terms["policy"]
        assert unit == "token"
        gradients += torch.autograd.grad(total, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(-(logits.softmax(-1) * gain).sum(), logits)
    torch.testing.assert_close(gradients[0], exact)
    assert not torch.allclose(gradients[1], exact, atol=0.05)


def test_the_gradient_is_that_of_the_written_formula() -> None:
    """-1/T sum_t min(pi_old / pi_sampler, c) w_i min(r_t A_t, clip(r_t) A_t), r_t of the trainer's
    weights after a step, by autograd over a loop."""
    made, cap, clip = page(Hot, correction="truncated", correction_cap=1.2), 1.2, 0.2
    batch, estimated = first_experience(made)
    actor = made.actor
    assert isinstance(actor, TorchActor) and batch.rollout.generation_logprobs is not None
    with torch.no_grad():
        for seed, p in enumerate(actor.parameters):
            p.add_(0.2 * draw(seed, *p.shape).float())
    backward([(batch, made.actor_loss)], actor._stats, DP, 0)
    found = [p.grad.clone() for p in actor.parameters if p.grad is not None]
    live = actor.logits(batch.rollout.tokens).log_softmax(-1)
    total, tokens, clipped = torch.zeros(()), 0, 0
    for b, t in batch.rollout.mask.nonzero().tolist():
        old = float(batch.logprobs[b, t])
        weight = min(math.exp(old - float(batch.rollout.generation_logprobs[b, t])), cap)
        gain = float(batch.weights[b]) * float(estimated[b, t])
        ratio = (live[b, t, batch.rollout.tokens[b, t]] - old).exp()
        near = ratio.clamp(1 - clip, 1 + clip)
        total = total - weight * torch.minimum(ratio * gain, near * gain)
        tokens += 1
        clipped += bool(near != ratio)
    expected = torch.autograd.grad(total / tokens, actor.parameters)
    assert tokens > BATCH // 2 and clipped > 3 and len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------- one page, many layouts


def numbers(made: PPO) -> list[dict[str, float]]:
    return [reduce_metrics(made.step(step).metrics, made.dp) for step in range(2)]


def test_replicas_and_micro_batches_change_nothing() -> None:
    def corrected(dp: Any = DP, micro_batch: int = 0) -> list[dict[str, float]]:
        return numbers(page(Hot, dp, micro_batch, correction="truncated", correction_cap=1.3))

    expected = corrected()
    assert 0 < expected[0]["rollout/capped"] < 1
    assert 0.3 < expected[0]["rollout/effective_sample_size"] < 0.999
    others = [*run_replicas(2, corrected), corrected(micro_batch=3)]
    assert len(others) == 3
    for found, reference in itertools.product(others, [expected]):
        for one, whole in zip(found, reference, strict=True):
            assert one.keys() == whole.keys() and len(one) > 50
            for name, value in whole.items():
                assert one[name] == pytest.approx(value, rel=2e-4, abs=2e-4, nan_ok=True), name


def test_a_sampler_with_a_number_that_is_none_skips_the_step() -> None:
    @dataclass
    class Broken(Rollouts):
        def respond(self, actor: Any, prompts: Prompts, sampling: Sampling) -> Rollout:
            rollout = actor.generate(prompts, sampling)
            rollout.generation_logprobs[2, int(prompts.lengths[2])] = math.nan
            return rollout

    assert list(page(Broken, correction="truncated").step(0).skipped.values()) == [(2,)]
