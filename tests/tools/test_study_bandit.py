"""The batched bandit against the real page and components of tests/bandit.py, on the same draws.

Its systems are those of study S2, all but random groups, which it draws in another way.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gipo_megatron.components.groups import CriticHead, NoGroups
from gipo_megatron.components.kl import FixedKL, GroupAdaptiveKL, NoKL
from gipo_megatron.components.protocols import GroupClassifier
from gipo_megatron.components.variance import (
    GroupDRO,
    GroupVariance,
    NoVariance,
    ReturnVariance,
)
from gipo_megatron.local.roles import _noise
from gipo_megatron.roles import DataParallel
from gipo_megatron.specs import Sampling
from tests import bandit as real
from tools.studies import bandit, networks
from tools.studies.systems import SYSTEMS

SEEDS, STEPS = [0, 1, 2], 12
ETA = 0.3
SPEC = bandit.WorldSpec("easy")
# between two actions whose scores differ by less than this, rounding chooses
TIE = 1e-2


class SameDraws:
    """The draws of tests/bandit.py: prompts, exponential noise of the actions, reward noise.

    taken [step, seed, B]: actions of the real page, which are taken here after a check that they
    are the likeliest ones under the noise but for rounding. One action that rounding turned would
    move a policy by 1e-3, and the difference grows from there.
    """

    def __init__(self, taken: Tensor) -> None:
        self.taken = taken

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
        scores = logp[rows, ids] - noise.log()
        taken = self.taken[step]
        lost = scores.amax(-1) - scores.gather(-1, taken[..., None])[..., 0]
        assert float(lost.max()) < TIE
        assert float((lost > 0).float().mean()) < 0.01
        return taken

    @staticmethod
    def _exponential(seed: int, step: int) -> Tensor:
        sampling = Sampling(max_response=1, seed=seed, step=step)
        samples = range(step * real.BATCH, (step + 1) * real.BATCH)
        return torch.cat([_noise(sampling, i, real.NUM_ACTIONS) for i in samples])


def certain_head(dp: DataParallel) -> GroupClassifier:
    return CriticHead(lr=1e-2, detach_trunk=True, entropy=0.0)


def return_variance(dp: DataParallel) -> real.Parts:
    return NoGroups(), ReturnVariance(beta=0.1), FixedKL(ETA)


def group_dro(dp: DataParallel) -> real.Parts:
    return real.value_split(dp), GroupDRO(step=0.1), FixedKL(ETA)


def both(dp: DataParallel) -> real.Parts:
    return real.value_split(dp), GroupVariance(dp=dp), GroupAdaptiveKL(eta=ETA, dp=dp)


PAIRS: dict[str, real.System] = {
    "ppo": lambda dp: (NoGroups(), NoVariance(), NoKL()),
    "ppo_kl": real.ppo_kl(ETA),
    "gipo_shared": real.gipo(certain_head, ETA, weigh_kl=True, min_weight=0.0),
    "gipo_head": real.gipo(real.head, ETA),
    "gipo_value": real.gipo(real.value_split, ETA),
    "adaptive": real.adaptive(real.value_split, ETA),
    "gipo_both": both,
    "oracle": real.gipo(real.given, ETA),
    "return_variance": return_variance,
    "group_dro": group_dro,
}


def test_every_system_is_compared() -> None:
    assert [name for name in SYSTEMS if name != "random"] == list(PAIRS)


def trained(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return the policy [P, A] of the real page, and the actions that it took [STEPS, B]."""
    run = real.make(PAIRS[name], seed, SPEC, clip=5.0)
    results = real.train(run, STEPS)
    actions = [[int(row["response"]) for row in r.samples] for r in results]
    return run.policy(), torch.tensor(actions)


@pytest.mark.parametrize("name", PAIRS)
def test_three_seeds_agree_with_the_real_page(name: str) -> None:
    policies, actions = zip(*(trained(name, seed) for seed in SEEDS), strict=True)
    world = bandit.World.make(SPEC, SEEDS)
    start = networks.imitate(networks.policy_weights(SEEDS), world.reference)
    draws = SameDraws(torch.stack(actions, 1))
    eta = 0.0 if name == "ppo" else ETA
    runs = bandit.Runs(SYSTEMS[name], world, start, [eta], SEEDS, draws)
    for step in range(STEPS):
        runs.step(step)
    found = networks.log_policy(runs.actor.weights).detach().exp()
    torch.testing.assert_close(found, torch.stack(policies), rtol=0, atol=2e-4)
    moved = (found - world.reference).abs().amax((1, 2))
    assert (moved > 0.02).all()
