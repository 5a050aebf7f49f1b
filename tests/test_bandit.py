"""Study S1, convergence: the planted bandit (algorithm.md section 9) through the real PPO page and
components, where PPO with KL leaves a gap between easy and hard prompts."""

from __future__ import annotations

from tests import bandit

ETA, BETA, STEPS = 0.3, 0.6, 200
SEEDS = range(3)


def test_price_over_weight_changes_where_training_ends() -> None:
    """At one η the gap is smaller with learned groups and smallest with given ones, and the mean is
    no lower. Study S2 compares at equal KL.

    The learned groups are critic_head's, the recipes' default. value_split's are as good as given
    ones here, so that an order of the two would be chance.
    """
    ppo = bandit.average(bandit.ppo_kl(ETA), SEEDS, STEPS)
    given = bandit.average(bandit.gipo(bandit.given, ETA, beta=BETA), SEEDS, STEPS)
    learned = bandit.average(bandit.gipo(bandit.head, ETA, beta=BETA), SEEDS, STEPS)
    print(f"PPO with KL {ppo}\ngiven groups {given}\nlearned groups {learned}")
    assert given.gap < learned.gap < ppo.gap - 0.02
    assert min(given.mean, learned.mean) >= ppo.mean
