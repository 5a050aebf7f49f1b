"""The planted bandit (algorithm.md section 9) through the real PPO page and components: groups must
help, in the order that theory gives."""

from __future__ import annotations

import pytest

from tests import bandit

SEEDS, STEPS = range(5), 60


def means(name: str) -> tuple[float, float]:
    """(gap, mean) of true reward over easy and hard prompts, averaged over the paired seeds."""
    values = []
    for seed in SEEDS:
        system = bandit.make(bandit.SYSTEMS[name], seed)
        bandit.train(system, STEPS)
        values.append(system.value())
    assert len(values) == 5
    easy, hard = (sum(column) / len(values) for column in zip(*values, strict=True))
    return easy - hard, (easy + hard) / 2


@pytest.mark.timeout(300)
def test_gaps_are_ordered_and_the_mean_does_not_suffer() -> None:
    gap, mean = zip(
        *(means(name) for name in ("oracle", "gipo_prompt", "ppo_kl", "no_groups")), strict=True
    )
    print(
        "oracle, prompt input, PPO with KL, no groups: gap",
        [round(x, 3) for x in gap],
        "mean",
        [round(x, 3) for x in mean],
    )
    assert gap[0] < gap[1] < gap[2] < gap[3], gap
    assert mean[0] >= mean[2] - 0.01, mean
    assert mean[1] >= mean[2] - 0.01, mean
