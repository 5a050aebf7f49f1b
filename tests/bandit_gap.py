"""The difficulty check of algorithm.md section 9: the gap between easy and hard prompts.

    python -m tests.bandit_gap [SEEDS] [STEPS]

Prints, for each system, gap and mean of the true reward: mean over paired seeds ± standard error.
docs/results.md holds the table.
"""

from __future__ import annotations

import sys
from statistics import fmean, stdev

from gipo_megatron.components.groups import NoGroups
from gipo_megatron.components.kl import FixedKL
from gipo_megatron.components.variance import ReturnVariance
from gipo_megatron.roles import DataParallel
from tests import bandit


def return_variance(dp: DataParallel) -> bandit.Parts:
    return NoGroups(), ReturnVariance(beta=0.1), FixedKL(0.05)


SYSTEMS: dict[str, bandit.System] = {
    "given groups (oracle), β 0.3": bandit.gipo(bandit.given, beta=0.3),
    "GIPO, prompt input, β 0.3": bandit.gipo(bandit.head, beta=0.3),
    "PPO with KL": bandit.ppo_kl(),
    "return variance without groups, β 0.1": return_variance,
}


def outcome(system: bandit.System, seed: int, steps: int) -> bandit.Outcome:
    run = bandit.make(system, seed)
    bandit.train(run, steps)
    return run.outcome()


def interval(numbers: list[float]) -> str:
    return f"{fmean(numbers):.3f} ± {stdev(numbers) / len(numbers) ** 0.5:.3f}"


if __name__ == "__main__":
    seeds, steps = (int(word) for word in (sys.argv[1:] + ["5", "60"][len(sys.argv) - 1 :]))
    for words, system in SYSTEMS.items():
        found = [outcome(system, seed, steps) for seed in range(seeds)]
        columns = [[x.gap for x in found], [x.mean for x in found], [x.kl for x in found]]
        print(f"| {words} | {' | '.join(interval(column) for column in columns)} |", flush=True)
