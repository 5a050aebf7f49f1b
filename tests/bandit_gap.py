"""The difficulty check of algorithm.md section 9: the gap between easy and hard prompts.

    python -m tests.bandit_gap [SEEDS] [STEPS]

Prints, for each system, gap and mean of the true reward: mean over paired seeds ± standard error.
docs/results.md holds the table.
"""

from __future__ import annotations

import sys
from statistics import fmean, stdev

from tests import bandit

NAMES = {
    "oracle": "given groups (oracle), β 0.3",
    "gipo_prompt": "GIPO, prompt input, β 0.3",
    "ppo_kl": "PPO with KL",
    "no_groups": "return variance without groups, β 0.1",
}


def values(name: str, seed: int, steps: int) -> tuple[float, float]:
    """(gap, mean) of the true reward over easy and hard prompts after training."""
    system = bandit.make(bandit.SYSTEMS[name], seed)
    bandit.train(system, steps)
    easy, hard = system.value()
    return easy - hard, (easy + hard) / 2


def interval(numbers: list[float]) -> str:
    return f"{fmean(numbers):.3f} ± {stdev(numbers) / len(numbers) ** 0.5:.3f}"


if __name__ == "__main__":
    seeds, steps = (int(word) for word in (sys.argv[1:] + ["5", "60"][len(sys.argv) - 1 :]))
    for name, words in NAMES.items():
        gaps, means = zip(*(values(name, seed, steps) for seed in range(seeds)), strict=True)
        print(f"| {words} | {interval(list(gaps))} | {interval(list(means))} |", flush=True)
