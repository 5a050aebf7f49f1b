"""Study S1, offsets: a number from N(0, 1) is added to all proxy scores of a prompt, as a
Bradley-Terry reward model may do. Real PPO page and components, reward clip off."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from gipo_megatron.components.kl import GroupAdaptiveKL
from gipo_megatron.components.variance import GroupVariance
from gipo_megatron.local.roles import TorchCritic
from gipo_megatron.metrics import Metrics
from gipo_megatron.roles import DataParallel
from gipo_megatron.types import Groups
from tests import bandit
from tools.studies.bandit import WorldSpec

SEEDS, STEPS = range(3), 80
OFFSET = WorldSpec("none", offset=1.0)


def test_offsets_mislead_learned_groups_unless_scores_are_anchored() -> None:
    """PPO with KL has the same reward, anchored or not, as the GIPO that it is compared with."""
    found = {
        anchor: [
            bandit.average(system, SEEDS, STEPS, spec=OFFSET, clip=0.0, anchor=anchor)
            for system in (bandit.ppo_kl(), bandit.gipo(bandit.head))
        ]
        for anchor in ("none", "chosen")
    }
    print(found)
    ppo, gipo = found["none"]
    assert gipo.mean < ppo.mean - 0.02 and gipo.gap > ppo.gap + 0.02  # the failure
    ppo, gipo = found["chosen"]
    assert gipo.mean >= ppo.mean - 0.01
    assert gipo.gap <= ppo.gap + 0.01


@dataclass
class Watched:
    """A KL controller whose coefficients are kept."""

    inner: GroupAdaptiveKL
    found: list[Tensor] = field(default_factory=list)

    def kl_coefficients(self, groups: Groups) -> Tensor:
        self.found.append(self.inner.kl_coefficients(groups))
        return self.found[-1]

    def observe(self, groups: Groups, kl: float) -> Metrics:
        return self.inner.observe(groups, kl)


@pytest.mark.parametrize("seed", [0, 1])
def test_permuting_the_heads_rows_changes_nothing(seed: int) -> None:
    """Which index the easy prompts get is chance: weights and KL coefficients are the same for 30
    iterations, the hysteresis of the high group and the controller's memory included."""
    runs = []
    for order in ([0, 1], [1, 0]):
        controller = Watched(GroupAdaptiveKL(eta=0.2))

        def parts(dp: DataParallel, watched: Watched = controller) -> bandit.Parts:
            watched.inner.dp = dp
            return bandit.head(dp), GroupVariance(dp=dp), watched

        system = bandit.make(parts, seed)
        critic = system.ppo.critic
        assert isinstance(critic, TorchCritic) and critic.group is not None
        with torch.no_grad():
            last = list(critic.group.parameters())[-2:]  # weight [2, H] and bias [2]
            for p in last:
                p.copy_(p[order])
        results = bandit.train(system, 30)
        weights = [torch.tensor([row["weight"] for row in r.samples]) for r in results]
        high = [r.metrics["groups/high_index"].result() for r in results]
        runs.append((weights, controller.found, high))
    (weights, coefficients, high), (others, other_coefficients, other_high) = runs
    assert len(weights) == len(coefficients) == 30
    for a, b in zip([*weights, *coefficients], [*others, *other_coefficients], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # float32 rounding
    assert any(float(c.std()) > 0.01 for c in coefficients)
    assert [1 - x for x in high[1:]] == other_high[1:]
