"""The batched bandit against the real page and components of tests/bandit.py, on the same draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gipo_megatron.components.groups import CriticHead, LabelledGroups
from gipo_megatron.components.kl import FixedKL
from gipo_megatron.components.variance import GroupVariance
from gipo_megatron.local.roles import _noise
from gipo_megatron.roles import DataParallel
from gipo_megatron.specs import Sampling
from tests import bandit as real
from tools.studies import bandit, networks
from tools.studies.systems import System

SEEDS, STEPS = [0, 1, 2], 12
ODDS = 0.1
SHARED_PRICE = GroupVariance(beta=0.3, weigh_kl=True, min_weight=0.0)


class SameDraws:
    """The draws of tests/bandit.py: prompts, exponential noise of the actions, reward noise."""

    def prompts(self, step: int) -> Tensor:
        return torch.stack([real.prompts_of(step, seed).prompt_id for seed in SEEDS])

    def noise(self, step: int) -> Tensor:
        generators = [
            torch.Generator().manual_seed(77_000_000 + seed * 1_000_003 + step * real.BATCH)
            for seed in SEEDS
        ]
        return real.NOISE * torch.stack([torch.randn(real.BATCH, generator=g) for g in generators])

    def actions(self, logp: Tensor, ids: Tensor, step: int) -> Tensor:
        noise = torch.stack([self._exponential(seed, step) for seed in SEEDS])
        rows = torch.arange(len(ids))[:, None]
        return (logp[rows, ids] - noise.log()).argmax(-1)

    @staticmethod
    def _exponential(seed: int, step: int) -> Tensor:
        sampling = Sampling(max_response=1, seed=seed, step=step)
        samples = range(step * real.BATCH, (step + 1) * real.BATCH)
        return torch.cat([_noise(sampling, i, real.NUM_ACTIONS) for i in samples])


def given(dp: DataParallel) -> real.Parts:
    return LabelledGroups(sources=("easy", "hard")), SHARED_PRICE, FixedKL(0.05)


def shared(dp: DataParallel) -> real.Parts:
    head = CriticHead(lr=1e-2, detach_trunk=True, entropy=0.0)
    return head, SHARED_PRICE, FixedKL(0.05)


PAIRS = {
    "ppo": (real.ppo_no_kl, System(""), 0.0),
    "ppo_kl": (real.ppo_kl, System(""), 0.05),
    "head": (shared, System("", "head", "group_variance", over_price=False, min_weight=0), 0.05),
    "given": (given, System("", "given", "group_variance", over_price=False, min_weight=0), 0.05),
}


@pytest.mark.parametrize("name", PAIRS)
def test_three_seeds_agree_with_the_real_page(name: str) -> None:
    parts, system, eta = PAIRS[name]
    spec = bandit.WorldSpec("easy", hack_proxy=1.0, hack_odds=ODDS)
    world = bandit.World.make(spec, SEEDS)
    start = networks.imitate(networks.policy_weights(SEEDS), world.reference)
    runs = bandit.Runs(system, world, start, [eta], SEEDS, SameDraws(), reward_clip=0.8)
    for step in range(STEPS):
        runs.step(step)
    policies = networks.log_policy(runs.actor.weights).detach().exp()
    for seed, policy, gold in zip(SEEDS, policies, world.gold, strict=True):
        other = real.make(parts, seed, hacks=real.HACKS, hack_odds=ODDS)
        assert torch.equal(other.world.gold, gold)
        real.train(other, STEPS)
        torch.testing.assert_close(policy, other.policy(), rtol=0, atol=1e-3)
        moved = (policy - world.reference[seed]).abs().max()
        assert moved > 0.05
