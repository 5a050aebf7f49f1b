"""A world in which no KL coefficient can help (docs/results.md): on every easy prompt three actions
score +1 with the proxy, as right ones do, and -1 with gold.

    python -m tests.bandit_hacking [SEEDS] [STEPS]

The optimum of E[r] - eta KL is ref e^(r / eta) / Z, so equal scores keep the reference's odds at
every eta. No variance regulariser: only the KL controller differs. A second reference chooses hacks
a tenth as often. Prints gold of both halves, and the odds of a hack against a right answer on easy
prompts, before and after training: means over paired seeds ± standard error.
"""

from __future__ import annotations

import sys
from statistics import fmean

import torch
from torch import Tensor

from tests import bandit
from tests.bandit_gap import interval
from tools.studies.bandit import WorldSpec

REFERENCES = {"uniform": 1.0, "seldom hacks": 0.1}
SYSTEMS = {
    "fixed": lambda eta: bandit.ppo_kl(eta),
    "value_split": lambda eta: bandit.adaptive(bandit.value_split, eta),
    "given": lambda eta: bandit.adaptive(bandit.given, eta),
}


def hack_odds(policy: Tensor, gold: Tensor) -> float:
    """Return P(hack) / P(right answer) on easy prompts; policy and gold [prompts, actions]."""
    easy = slice(0, bandit.NUM_PROMPTS // 2)
    policy, gold = policy[easy], gold[easy]
    return float(policy[gold < 0].sum() / policy[gold > 0].sum())


def trained(system: bandit.System, seed: int, steps: int, odds: float) -> list[float]:
    """Return gold on easy prompts, on hard ones, and the odds of hacks after training."""
    spec = WorldSpec("easy", hack_proxy=1.0, hack_odds=odds)
    run = bandit.make(system, seed, spec)
    bandit.train(run, steps)
    found = run.outcome()
    return [found.easy, found.hard, hack_odds(run.policy(), run.world.gold[0])]


def main(seeds: int, steps: int) -> None:
    torch.set_num_threads(1)
    for reference, odds in REFERENCES.items():
        for eta in (0.05, 0.2):
            for name, system in SYSTEMS.items():
                rows = [trained(system(eta), seed, steps, odds) for seed in range(seeds)]
                easy, hard, after = (interval(list(column)) for column in zip(*rows, strict=True))
                mean = fmean((row[0] + row[1]) / 2 for row in rows)
                words = [reference, f"{eta:g}", name, easy, hard, f"{mean:.3f}"]
                print(f"| {' | '.join(words)} | {3 / 15 * odds:.2f} → {after} |", flush=True)


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["5", "60"][len(sys.argv) - 1 :])))
