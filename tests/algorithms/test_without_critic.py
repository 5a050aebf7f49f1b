"""RLOO and GRPO on the PPO page, with the group term, with and without a critic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.components import protocols
from gipo_megatron.components.advantage import GroupNormalised, LeaveOneOut
from gipo_megatron.components.groups import CriticHead, LabelledGroups, NoGroups, RandomGroups
from gipo_megatron.components.kl import FixedKL, GroupAdaptiveKL
from gipo_megatron.components.reward_head import RewardHead
from gipo_megatron.components.variance import GroupVariance, NoVariance
from gipo_megatron.local.replicas import run_replicas
from gipo_megatron.local.roles import TorchActor, TorchRewardModel
from gipo_megatron.roles import SingleReplica
from gipo_megatron.telemetry.metrics import reduce_metrics
from gipo_megatron.types import Loss
from tests.small_ppo import SOURCES, VOCAB, make_ppo, stored_rollout

ADVANTAGES: dict[str, Any] = {"rloo": LeaveOneOut, "grpo": GroupNormalised}
CLASSIFIERS: dict[str, Any] = {
    "none": lambda dp: NoGroups(),
    "labelled": lambda dp: LabelledGroups(sources=SOURCES),
    "random": lambda dp: RandomGroups(),
    "critic_head": lambda dp: CriticHead(lr=0.02),
    "reward_head": lambda dp: reward_head(dp),
}


def reward_head(dp: Any, lr: float = 0.02) -> RewardHead:
    return RewardHead(
        lr=lr, reward_models={"reward": TorchRewardModel(VOCAB, dp=dp)}, seed=0, dp=dp
    )


def make(advantage: str, classifier: str, dp: Any, **settings: Any) -> PPO:
    none = classifier == "none"
    return make_ppo(
        dp,
        CLASSIFIERS[classifier](dp),
        NoVariance() if none else GroupVariance(beta=0.3),
        FixedKL() if none else GroupAdaptiveKL(dp=dp),
        advantage=ADVANTAGES[advantage](dp=dp),
        **settings,
    )


def numbers(ppo: PPO, steps: int = 3) -> list[dict[str, float]]:
    return [reduce_metrics(ppo.step(step).metrics, ppo.dp) for step in range(steps)]


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_step_trains_the_policy(advantage: str, classifier: str) -> None:
    """A critic exists only where its head is needed; without one, no metric of it is logged."""
    ppo = make(advantage, classifier, SingleReplica(), critic_warmup=20)
    assert (ppo.critic is not None) is (classifier == "critic_head")
    assert isinstance(ppo.actor, TorchActor)
    before = [p.clone() for p in ppo.actor.parameters]
    result = ppo.step(0 if ppo.critic is None else 20)  # no warm-up without a critic
    assert not result.skipped
    assert any(not torch.equal(p, q) for p, q in zip(before, ppo.actor.parameters, strict=True))
    has_value = any(name.startswith("value/") for name in result.metrics)
    assert has_value is (ppo.critic is not None)
    extra = {"critic_head": 7, "reward_head": 3}.get(classifier, 0)
    assert result.forward_equivalents == 4 + 3 * 2 + extra


@pytest.mark.parametrize("classifier", ["labelled", "critic_head", "reward_head"])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_replicas_train_as_one_process_does(advantage: str, classifier: str) -> None:
    """Responses to one prompt are on different replicas."""
    expected = numbers(make(advantage, classifier, SingleReplica()))
    found = run_replicas(2, lambda dp: numbers(make(advantage, classifier, dp)))
    compared = 0
    for replica in found:
        for mine, reference in zip(replica, expected, strict=True):
            assert mine.keys() == reference.keys()
            # shares of pairs in order: rounding may swap two almost equal labels
            for name in mine.keys() - {"groups/auc", "groups/response_split"}:
                assert mine[name] == pytest.approx(
                    reference[name], rel=5e-4, abs=5e-4, nan_ok=True
                ), name
                compared += 1
    assert compared > 200


# --------------------------------------------------------------------- a head on the reward model


def hard_labels(head: RewardHead, ppo: PPO) -> Tensor:
    return head.logits(ppo.probe).argmax(-1)


def test_the_head_maximises_the_variance_between_groups() -> None:
    """Its updates raise R_var on a fixed batch, and leave the reward model alone."""
    ppo = make("rloo", "reward_head", SingleReplica())
    head = ppo.group_classifier
    assert isinstance(head, RewardHead) and isinstance(head, protocols.OwnHead)
    model = head.reward_models["reward"]
    assert isinstance(model, TorchRewardModel)
    before = [p.clone() for p in model.parameters]
    rollout = ppo.rollout.sample(ppo.actor, ppo.prompts(0), 0)
    scores = ppo.reward.score(rollout)

    def variance() -> float:
        groups = ppo.tracker.measure(head.probs(head.logits(rollout), None, rollout), scores)
        metrics = ppo.tracker.observe(groups, scores, None)
        return metrics["groups/variance"].result()

    ppo.actor = TorchActor(VOCAB, hidden=16, init_std=0.3, lr=0.0)  # the same rollout every time
    ppo.prompts = lambda step, same=ppo.prompts: same(0)
    first = variance()
    for _ in range(15):
        result = ppo.step(0)
    assert result.metrics["group_head/grad_norm"].result() > 0
    assert variance() > first + 0.01
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters, strict=True))


class Features:
    """A trunk of some width whose states have entries of +-1."""

    def __init__(self, width: int) -> None:
        noise = torch.randn(64, width, generator=torch.Generator().manual_seed(width))
        self.states = noise.sign()

    def features(self, rows: Any, position: str) -> Tensor:
        return self.states


@pytest.mark.parametrize("width", [128, 4096])
def test_labels_move_alike_on_every_width(width: int) -> None:
    """By hand: the first logits have std 0.02 sqrt(128), and the first Adam step moves the logit of
    a row that pulls alone by lr 128 / H (sum |h| + 1). Unscaled, a width of 4096 moved it by 4."""
    models: Any = {"reward": Features(width)}
    head = RewardHead(reward_models=models, seed=0, dp=SingleReplica())
    rows = stored_rollout(make("rloo", "reward_head", SingleReplica()))
    before = head.logits(rows)
    assert float(before.std()) == pytest.approx(0.02 * 128**0.5, rel=0.2)
    head.update((rows, lambda logits, batch: Loss({"group": (logits[0, 0], "sequence")})))
    moved = float((head.logits(rows) - before)[0, 0])
    assert moved == pytest.approx(-1e-3 * 128 * (width + 1) / width, rel=1e-3)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    models: Any = {"reward": Features(16)}
    head = RewardHead(reward_models=models, seed=0, dp=SingleReplica())
    rows = stored_rollout(make("rloo", "reward_head", SingleReplica()))
    before = head.logits(rows)
    for factor in (float("nan"), float("inf")):
        loss = lambda logits, batch, x=factor: Loss({"group": (x * logits[0, 0], "sequence")})  # noqa: E731
        assert head.update((rows, loss)).skipped == tuple(rows.row_ids.tolist())
    assert torch.equal(head.logits(rows), before)
    sound = head.update((rows, lambda logits, batch: Loss({"group": (logits[0, 0], "sequence")})))
    assert sound.skipped is None and head.logits(rows).isfinite().all()


def test_a_resumed_head_is_the_head() -> None:
    straight = make("rloo", "reward_head", SingleReplica())
    numbers(straight)
    resumed = make("rloo", "reward_head", SingleReplica())
    resumed.load_state_dict(straight.state_dict())
    a, b = straight.group_classifier, resumed.group_classifier
    assert isinstance(a, RewardHead) and isinstance(b, RewardHead)
    assert torch.equal(a.logits(straight.probe), b.logits(straight.probe))
    state_a, state_b = a.state_dict(), b.state_dict()
    moments = [s["optimizer"]["state"][0]["exp_avg"] for s in (state_a, state_b)]
    assert torch.equal(*moments)
    assert make("rloo", "reward_head", SingleReplica()).state_dict()["group_classifier"] == {}
