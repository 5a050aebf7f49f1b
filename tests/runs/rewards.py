"""Reward functions for runs that must go wrong: `algorithm.reward={name: function, function:
tests.runs.rewards:NAME}`."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from typing import Any

ROWS = 16  # responses a step in chain.ppo; without evaluations, call n is about step n // ROWS + 1
# packages that no first step needs, but a file of data, a metric, a report or a logger
LATE = {
    *("datasets", "pyarrow", "pandas", "sklearn", "scipy", "matplotlib", "wandb"),
    *("torch._dynamo", "torch._inductor"),
}
_calls: Counter[str] = Counter()


def _step(name: str) -> int:
    _calls[name] += 1
    return (_calls[name] - 1) // ROWS + 1


def length(prompt: str, response: str, extras: dict[str, Any]) -> float:
    return len(response) / 8


def nan_at_2(prompt: str, response: str, extras: dict[str, Any]) -> float:
    """NaN for the first and the fourth response of step 2."""
    bad = _step("nan_at_2") == 2 and (_calls["nan_at_2"] - 1) % ROWS in (0, 3)
    return math.nan if bad else length(prompt, response, extras)


def nan_from_3(prompt: str, response: str, extras: dict[str, Any]) -> float:
    return math.nan if _step("nan_from_3") >= 3 else length(prompt, response, extras)


def huge_at_2(prompt: str, response: str, extras: dict[str, Any]) -> float:
    """Finite, but its square is not: the critic's loss in step 2 overflows."""
    bad = _step("huge_at_2") == 2
    return 1e30 * length(prompt, response, extras) if bad else length(prompt, response, extras)


def slow(prompt: str, response: str, extras: dict[str, Any]) -> float:
    """A second a response. The first call prints which of LATE are imported by then."""
    if _step("slow") == 1 and _calls["slow"] == 1:
        print("imported:", *sorted(LATE & {*sys.modules}), flush=True)
    time.sleep(1.0)
    return length(prompt, response, extras)
