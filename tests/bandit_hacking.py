"""The hacking check of algorithm.md section 9: does adaptive KL beat fixed KL where the reward
model can be fooled?

    python -m tests.bandit_hacking [SEEDS] [STEPS]

On every easy prompt three actions score +1 with the proxy and -1 with gold. Each adaptive run is
paired with a fixed coefficient equal to its own mean; no variance regulariser, so that only the
KL controller differs. Prints gold return of both halves, averaged over seeds.

Against a uniform reference no coefficient separates a hack from a right action: both go to the same
1/50, and gold on easy prompts is (15 - 3) / 18 of the proxy at any coefficient. So the check is run
from a second reference as well, on which hacks are ten times rarer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch

from gipo_megatron.components import protocols
from gipo_megatron.components.groups import CriticHead, LabelledGroups, NoGroups
from gipo_megatron.components.kl import FixedKL, GroupAdaptiveKL
from gipo_megatron.components.variance import NoVariance
from gipo_megatron.roles import DataParallel
from tests import bandit

Row = tuple[float, float, float]  # gold easy, gold hard, mean price


def head(dp: DataParallel) -> protocols.GroupClassifier:
    return CriticHead(lr=1e-2, detach_trunk=True)


def given(dp: DataParallel) -> protocols.GroupClassifier:
    return LabelledGroups(sources=("easy", "hard"))


def run(
    controller: Callable[[DataParallel], bandit.Parts], seed: int, steps: int, odds: float
) -> Row:
    system = bandit.make(controller, seed, hacks=bandit.HACKS, hack_odds=odds)
    results = bandit.train(system, steps)
    prices = [r.metrics["kl/coef_mean"].result() for r in results]
    return *system.value(), sum(prices) / len(prices)


def pair(
    classifier: Callable[[DataParallel], protocols.GroupClassifier],
    eta: float,
    seed: int,
    steps: int,
    odds: float,
) -> tuple[Row, Row]:
    adaptive = run(
        lambda dp: (classifier(dp), NoVariance(), GroupAdaptiveKL(eta=eta, dp=dp)),
        seed,
        steps,
        odds,
    )
    fixed = run(lambda dp: (NoGroups(), NoVariance(), FixedKL(eta=adaptive[2])), seed, steps, odds)
    return adaptive, fixed


def difference(a: list[Row], b: list[Row], column: int) -> str:
    """Mean paired difference and its standard error."""
    d = [x[column] - y[column] for x, y in zip(a, b, strict=True)]
    mean = sum(d) / len(d)
    error = math.sqrt(sum((x - mean) ** 2 for x in d) / max(len(d) - 1, 1) / len(d))
    return f"{mean:+.3f} ± {error:.3f}"


def report(title: str, pairs: list[tuple[Row, Row]]) -> None:
    adaptive, fixed = [p[0] for p in pairs], [p[1] for p in pairs]
    for label, rows in (("adaptive", adaptive), ("fixed", fixed)):
        easy, hard, price = (sum(c) / len(rows) for c in zip(*rows, strict=True))
        print(
            f"{title}: {label:8s} easy {easy:.3f}  hard {hard:.3f}  mean {(easy + hard) / 2:.3f} "
            f" price {price:.4f}"
        )
    print(
        f"{title}: adaptive - fixed, easy {difference(adaptive, fixed, 0)}  hard"
        f" {difference(adaptive, fixed, 1)}",
        flush=True,
    )


def main(seeds: int, steps: int) -> None:
    torch.set_num_threads(1)
    print(f"{seeds} paired seeds, {steps} steps; gold return on easy / hard prompts")
    for start, odds in (("uniform reference", 1.0), ("reference that seldom hacks", 0.1)):
        for name, classifier in (("learned groups", head), ("given groups", given)):
            for eta in (0.05, 0.2):
                report(
                    f"{start}, {name}, eta {eta}",
                    [pair(classifier, eta, seed, steps, odds) for seed in range(seeds)],
                )


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 5, int(sys.argv[2]) if len(sys.argv) > 2 else 60
    )
