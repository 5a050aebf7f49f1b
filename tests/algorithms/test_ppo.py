"""PPO's losses against a loop over tokens, its resume, its splits over replicas and micro-batches,
what it does with non-finite numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.components.groups import CriticHead, LabelledGroups, NoGroups
from gipo_megatron.components.kl import AdaptiveKL, FixedKL, GroupAdaptiveKL
from gipo_megatron.components.rollout import Rollouts
from gipo_megatron.components.variance import GroupDRO, GroupVariance, NoVariance
from gipo_megatron.local.replicas import run_replicas
from gipo_megatron.local.roles import TorchActor, TorchCritic
from gipo_megatron.roles import SingleReplica
from gipo_megatron.specs import Sampling
from gipo_megatron.telemetry.metrics import reduce_metrics
from gipo_megatron.types import (
    CriticOutput,
    Experience,
    Prompts,
    Rollout,
    Rows,
    TokenStats,
    Update,
)
from tests.small_ppo import (
    BATCH,
    RESPONSES,
    SOURCES,
    VOCAB,
    make_ppo,
    prompts_at,
    stored_rollout,
)

DP = SingleReplica()


def gipo(dp: Any = DP, micro_batch: int = 0, **settings: Any) -> PPO:
    return make_ppo(
        dp,
        CriticHead(lr=0.02),
        GroupVariance(beta=0.3),
        GroupAdaptiveKL(dp=dp),
        micro_batch,
        **settings,
    )


def plain(**settings: Any) -> PPO:
    return make_ppo(DP, NoGroups(), NoVariance(), FixedKL(), **settings)


def experience() -> Experience:
    ppo = plain()
    rollout = stored_rollout(ppo)
    generator = torch.Generator().manual_seed(9)
    shape = rollout.tokens.shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    probs = draw(BATCH, 2).softmax(-1)
    return Experience(
        rollout,
        -draw(*shape).exp(),
        draw(*shape),
        draw(*shape),
        draw(*shape),
        1 + draw(BATCH),
        probs,
        draw(BATCH, 2),
    )


# ------------------------------------------------------------------------------------------- losses


def test_actor_loss_is_the_loop_over_tokens() -> None:
    batch, clip, bonus = experience(), 0.2, 0.01
    assert batch.values is not None
    output = TokenStats(batch.logprobs + 0.3 * batch.values, batch.returns.abs())
    expected, entropy, clipped, tokens = 0.0, 0.0, 0, 0
    for b, t in batch.rollout.mask.nonzero().tolist():
        ratio = math.exp(float(output.logprobs[b, t] - batch.logprobs[b, t]))
        advantage = float(batch.weights[b] * batch.advantages[b, t])
        expected += -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
        entropy += float(batch.returns[b, t].abs())
        # the clipped branch is the loss: one direction for each sign of the advantage
        clipped += ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
        tokens += 1
    assert tokens > BATCH
    assert (batch.weights < 0).any()
    loss = plain(clip=clip, entropy=bonus).actor_loss(output, batch)
    assert {
        name: (pytest.approx(float(value)), unit) for name, (value, unit) in loss.terms.items()
    } == {
        "policy": (expected, "token"),
        "entropy": (-bonus * entropy, "token"),
    }
    assert loss.metrics["loss"].result() == pytest.approx(expected / tokens)
    assert loss.metrics["clip_fraction"].result() == pytest.approx(clipped / tokens)
    assert loss.metrics["entropy"].result() == pytest.approx(entropy / tokens)


def test_critic_loss_is_the_loop_over_tokens() -> None:
    batch, clip = experience(), 0.2
    assert batch.values is not None
    values, logits = batch.values + 0.5 * batch.returns, 2 * batch.group_loss_coefficients.flip(0)
    expected = 0.0
    for b, t in batch.rollout.mask.nonzero().tolist():
        v, old, target = (float(x[b, t]) for x in (values, batch.values, batch.returns))
        near = old + min(max(v - old, -clip), clip)
        expected += max((v - target) ** 2, (near - target) ** 2) / 2
    gain = 0.0
    for b in range(BATCH):
        scale = sum(math.exp(float(x)) for x in logits[b])
        for c, x in zip(batch.group_loss_coefficients[b], logits[b], strict=True):
            p = math.exp(float(x)) / scale
            gain += float(c) * p - 0.05 * p * math.log(p)
    classifier = CriticHead(beta_critic=0.7, entropy=0.05)
    ppo = make_ppo(DP, classifier, NoVariance(), FixedKL(), value_clip=clip)
    loss = ppo.critic_loss(CriticOutput(values, logits), batch)
    assert {
        name: (pytest.approx(float(value)), unit) for name, (value, unit) in loss.terms.items()
    } == {
        "value": (expected, "token"),
        "group": (-0.7 * gain, "sequence"),
    }
    assert set(ppo.critic_loss(CriticOutput(values, None), batch).terms) == {"value"}


# --------------------------------------------------------------------------- one page, many layouts


def numbers(ppo: PPO, step: int) -> dict[str, float]:
    return reduce_metrics(ppo.step(step).metrics, ppo.dp)


def assert_close(a: dict[str, float], b: dict[str, float], rel: float) -> None:
    assert a.keys() == b.keys()
    assert len(a) > 50
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=rel, abs=rel, nan_ok=True), name


@pytest.mark.parametrize("size", [2, 4])
def test_replicas_train_as_one_process_does(size: int) -> None:
    whole = gipo(ptx=0.1, entropy=0.01)
    expected = [numbers(whole, step) for step in range(3)]

    def work(dp: Any) -> list[dict[str, float]]:
        ppo = gipo(dp, ptx=0.1, entropy=0.01)
        return [numbers(ppo, step) for step in range(3)]

    rows = run_replicas(size, work)
    assert len(rows) == size
    for replica in rows:
        for found, reference in zip(replica, expected, strict=True):
            assert_close(found, reference, rel=2e-4)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_nothing(micro_batch: int) -> None:
    a, b = gipo(), gipo(micro_batch=micro_batch)
    for step in range(2):
        assert_close(numbers(a, step), numbers(b, step), rel=1e-4)


# -------------------------------------------------------------------------------------------- state


def copy_models(source: PPO, target: PPO) -> None:
    for a, b in ((source.actor, target.actor), (source.critic, target.critic)):
        assert isinstance(a, (TorchActor, TorchCritic))
        assert isinstance(b, (TorchActor, TorchCritic))
        steppers = [(a._stepper, b._stepper)]
        if (
            isinstance(a, TorchCritic)
            and isinstance(b, TorchCritic)
            and a._group_stepper is not None
        ):
            assert b._group_stepper is not None
            steppers.append((a._group_stepper, b._group_stepper))
        for x, y in steppers:
            for p, q in zip(x.parameters, y.parameters, strict=True):
                q.data.copy_(p.data)
            y.optimizer.load_state_dict(x.optimizer.state_dict())


@pytest.mark.parametrize("kind", ["gipo", "dro", "labelled"])
def test_a_resumed_run_is_the_run(kind: str) -> None:
    def make() -> PPO:
        if kind == "gipo":
            return make_ppo(
                DP,
                CriticHead(lr=0.02),
                GroupVariance(),
                GroupAdaptiveKL(dp=DP),
            )
        if kind == "labelled":
            return make_ppo(DP, LabelledGroups(sources=SOURCES), GroupVariance(), FixedKL())
        return make_ppo(DP, CriticHead(num_groups=3), GroupDRO(), AdaptiveKL(horizon=100))

    straight, stopped = make(), make()
    for step in range(3):
        numbers(straight, step)
        numbers(stopped, step)
    resumed = make()
    copy_models(stopped, resumed)
    resumed.load_state_dict(stopped.state_dict())
    for step in range(3, 5):
        a, b = numbers(straight, step), numbers(resumed, step)
        assert a.keys() == b.keys()
        assert all(
            a[name] == b[name] or (math.isnan(a[name]) and math.isnan(b[name])) for name in a
        )


def test_the_critic_warms_up_alone() -> None:
    ppo = gipo(critic_warmup=1)
    assert isinstance(ppo.actor, TorchActor)
    before = [p.clone() for p in ppo.actor.parameters]
    first = ppo.step(0)
    assert all(torch.equal(p, q) for p, q in zip(before, ppo.actor.parameters, strict=True))
    assert "policy/loss" not in first.metrics and ppo.actor.version == 0
    assert "policy/loss" in ppo.step(1).metrics and ppo.actor.version == 4


def test_minibatches_are_blocks_in_order_every_epoch() -> None:
    blocks = [
        (index, batch.row_ids.tolist()) for index, batch in plain()._minibatches(experience())
    ]
    assert blocks == [
        (0, list(range(8))),
        (1, list(range(8, 16))),
        (2, list(range(8))),
        (3, list(range(8, 16))),
    ]


# ----------------------------------------------------------------------------- numbers that are not


class Broken:
    """A reward model with a NaN for one sample."""

    def score(self, batch: Rows) -> Tensor:
        return torch.where(batch.row_ids == 5, math.nan, 1.0)


@pytest.mark.parametrize("size", [1, 2])
def test_a_score_that_is_no_number_skips_the_step_everywhere(size: int) -> None:
    def work(dp: Any) -> tuple[dict[str, tuple[int, ...]], float, bool]:
        ppo = gipo(dp)
        ppo.reward._reward_model = Broken()  # type: ignore[attr-defined]
        before = [p.clone() for p in ppo.actor.parameters]  # type: ignore[attr-defined]
        result = ppo.step(0)
        same = all(torch.equal(p, q) for p, q in zip(before, ppo.actor.parameters, strict=True))  # type: ignore[attr-defined]
        return result.skipped, reduce_metrics(result.metrics, dp)["reward/non_finite"], same

    skipped = {"no update, scores that are not finite": (5,)}
    assert run_replicas(size, work) == [(skipped, 1.0, True)] * size


@dataclass
class BrokenHead:
    """A critic whose group logits hold a NaN in one iteration."""

    inner: TorchCritic
    broken: bool = False

    def evaluate(self, batch: Rows) -> CriticOutput:
        output = self.inner.evaluate(batch)
        assert output.group_logits is not None
        logits = output.group_logits.clone()
        if self.broken:
            logits[3, 0] = math.nan
        return CriticOutput(output.values, logits)

    def update(self, *parts: Any) -> Update:
        return self.inner.update(*parts)


def test_a_group_logit_that_is_no_number_is_not_remembered() -> None:
    ppo = gipo()
    assert isinstance(ppo.critic, TorchCritic)
    critic = BrokenHead(ppo.critic)
    ppo.critic = critic
    ppo.step(0)
    memory = {name: repr(part) for name, part in ppo.state_dict().items() if name != "reward"}
    critic.broken = True
    assert list(ppo.step(1).skipped) == ["no update, group logits that are not finite"]
    after = {name: repr(part) for name, part in ppo.state_dict().items() if name != "reward"}
    assert after == memory and "nan" not in "".join(memory.values())


# ------------------------------------------------------------------------------------- evaluation


class TwoBatches:
    """Held-out prompts, two batches of them."""

    sources, gold = SOURCES, None

    def batches(self) -> Any:
        for step in (100, 101):
            yield prompts_at(step, DP), torch.ones(BATCH)


def test_the_kl_of_an_evaluation_is_of_responses_drawn_from_the_policy() -> None:
    """The scored responses are drawn colder, and of those log pi - log ref is no KL estimate."""
    ppo = gipo()
    ppo.step(0)
    ppo.held_out = TwoBatches()  # type: ignore[assignment]
    ppo.sampling = Sampling(max_response=RESPONSES, temperature=0.2, top_p=0.9, seed=5)
    drawn = []

    def generate(prompts: Prompts, sampling: Sampling, inner: Any = ppo.actor.generate) -> Rollout:
        drawn.append((sampling.temperature, sampling.top_p))
        return inner(prompts, sampling)

    ppo.actor.generate = generate  # type: ignore[method-assign]
    metrics, _ = ppo.evaluate()
    assert drawn == [(0.2, 0.9), (1.0, 1.0), (0.2, 0.9)]
    whole = replace(ppo.sampling, temperature=1.0, top_p=1.0)
    rollout = ppo.actor.generate(prompts_at(100, DP), whole)
    ratio = ppo.actor.logprobs(rollout).logprobs - ppo.reference.logprobs(rollout).logprobs
    assert metrics["eval/kl"].result() == pytest.approx(float(ratio.sum(1).mean()), rel=1e-6)


class WithGold:
    """One batch of held-out prompts whose last row is padding; gold is the response's length."""

    sources = SOURCES

    @staticmethod
    def gold(prompt: str, response: str) -> float:
        return float(len(prompt) + 10 * len(response))

    def batches(self) -> Any:
        yield prompts_at(100, DP), torch.tensor([1.0] * (BATCH - 1) + [0.0])


def test_an_evaluation_returns_each_prompts_gold() -> None:
    ppo = gipo()
    ppo.held_out = WithGold()  # type: ignore[assignment]
    ppo.sampling = Sampling(max_response=RESPONSES, seed=5)
    metrics, rows = ppo.evaluate()
    assert len(rows) == BATCH - 1 and len({row["source"] for row in rows}) == 2
    assert all(row["gold"] == WithGold.gold(row["prompt"], row["response"]) for row in rows)
    for source in SOURCES:
        mine = [row["gold"] for row in rows if row["source"] == source]
        assert metrics[f"eval/prompts/{source}"].result() == len(mine) > 0
        assert metrics[f"eval/gold/{source}"].result() == pytest.approx(sum(mine) / len(mine))


class Lengths:
    """A gold model that scores a response by its length."""

    def score(self, rollout: Rollout) -> torch.Tensor:
        return rollout.response_lengths.double()


def test_held_out_responses_come_from_the_sampler() -> None:
    """As it is told to draw them, and not from the actor."""
    ppo = gipo()
    ppo.held_out = WithGold()  # type: ignore[assignment]
    ppo.sampling = Sampling(max_response=RESPONSES, temperature=0.2, seed=5)
    drawn: list[Sampling] = []

    class Elsewhere(Rollouts):
        def respond(self, actor: Any, prompts: Prompts, sampling: Sampling) -> Rollout:
            drawn.append(sampling)
            return other.generate(prompts, sampling)

    other = TorchActor(VOCAB, hidden=16, init_std=2.0, seed=50)
    ppo.rollout = Elsewhere()
    _, rows = ppo.evaluate()
    assert drawn == [ppo.sampling, replace(ppo.sampling, temperature=1.0)]
    expected = other.generate(prompts_at(100, DP), ppo.sampling).response_text
    assert [row["response"] for row in rows] == list(expected[:-1])


@pytest.mark.parametrize("given", [True, False])
def test_a_gold_model_is_used_before_the_gold_of_the_data(given: bool) -> None:
    """By source, too. Without either there is no gold."""
    ppo = gipo()
    held_out = TwoBatches()
    ppo.held_out = held_out  # type: ignore[assignment]
    ppo.sampling = Sampling(max_response=RESPONSES, seed=5)
    assert not [name for name in ppo.evaluate()[0] if "gold" in name]
    held_out.gold = lambda prompt, response: -7.0  # type: ignore[assignment]
    ppo.gold = Lengths() if given else None  # type: ignore[assignment]
    metrics = {name: metric.result() for name, metric in ppo.evaluate()[0].items()}
    assert metrics["eval/gold"] == (metrics["eval/length"] if given else -7.0)
    by_source = [metrics[f"eval/gold/{source}"] for source in SOURCES]
    assert min(by_source) <= metrics["eval/gold"] <= max(by_source)


# -------------------------------------------------------------------------------- what a step shows


def test_a_step_shows_the_stable_names() -> None:
    """The metrics of docs/metrics.md that PPO itself logs."""
    result = gipo().step(0)
    groups = (
        "gap gap_std variance mass_min label_entropy high_index flip_rate return_high return_low"
        " return_worst auc ami"
    )
    per_group = "return score kl length entropy clip_fraction"
    expected = {
        *(
            f"rollout/{x}"
            for x in ("length_mean", "truncated", "logprob_gap_mean", "logprob_gap_max")
        ),
        *(f"rollout/{x}" for x in ("effective_sample_size", "capped")),
        *(f"reward/{x}" for x in ("score_mean", "score_std", "between_prompts")),
        *(f"kl/{x}" for x in ("mean", "coef_mean")),
        *(f"groups/{x}" for x in groups.split()),
        *(f"groups/{x}_{g}" for x in per_group.split() for g in (0, 1)),
        *(f"groups/high_corr_{x}" for x in ("score", "length")),
        *(f"source/{s}/{x}" for s in ("easy", "hard") for x in ("score", "return", "kl", "p_high")),
        *(f"weights/{x}" for x in ("mean", "min", "max", "clamped")),
        *(f"policy/{x}" for x in ("loss", "clip_fraction", "entropy", "grad_norm", "ratio_max")),
        *(f"value/{x}" for x in ("loss", "explained_variance", "grad_norm")),
    }
    assert len(expected) == 57
    assert expected - result.metrics.keys() == set()
    assert len(result.samples) == BATCH
    assert result.samples[0].keys() >= {"prompt", "response", "score", "p_high", "weight", "kl"}
    assert result.metrics["rollout/logprob_gap_max"].result() < 1e-5
