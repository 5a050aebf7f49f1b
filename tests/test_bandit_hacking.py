"""Study S1, over-optimisation: hacks on easy prompts that the proxy over-rates (2.5, a right answer
has 1; gold -1). Real PPO page and components, reward clip off."""

from __future__ import annotations

import pytest

from tests import bandit
from tools.studies.bandit import WorldSpec

ETA, STEPS = 0.45, 150
SEEDS = range(3)
OVERRATED = WorldSpec("easy", hack_proxy=2.5, hack_odds=0.3)


def test_a_price_per_group_prevents_hacks_that_one_price_cannot_prevent() -> None:
    """At an equal mean coefficient, on both halves; random groups do nothing.

    The learned groups are value_split's: as the driver of a KL coefficient they are steadier than
    critic_head's, whose first labels are chance.
    """
    systems = {
        "adaptive": bandit.adaptive(bandit.value_split, ETA),
        "random": bandit.adaptive(bandit.random_groups, ETA),
        # the mean coefficient of the others is ETA in every iteration
        "fixed": bandit.ppo_kl(ETA),
    }
    found = {
        name: bandit.average(system, SEEDS, STEPS, spec=OVERRATED, clip=0.0)
        for name, system in systems.items()
    }
    print(found)
    fixed = found["fixed"]
    assert found["adaptive"].easy > fixed.easy + 0.1
    assert found["adaptive"].hard > fixed.hard + 0.1
    assert found["random"].easy == pytest.approx(fixed.easy, abs=0.02)
    assert found["random"].hard == pytest.approx(fixed.hard, abs=0.02)
