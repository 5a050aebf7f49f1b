"""Policies, prompts and judges from closed formulas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gipo_megatron.evaluation.types import (
    FAILED,
    FIRST,
    LOSE,
    SECOND,
    TIE,
    WIN,
    Duel,
    Response,
    TaskPrompt,
    Verdict,
)

BOTH = {
    WIN: (FIRST, SECOND),
    LOSE: (SECOND, FIRST),
    TIE: (TIE, TIE),
    FAILED: (FAILED, FIRST),
    "flipped": (FIRST, FIRST),
}
MARKUP = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> {{ 7*7 }} & \x00"
    " \u2028"
)


def duel(
    outcome: str,
    i: int,
    *,
    lengths: tuple[int, int] = (10, 10),
    source: str = "",
    p_high: float | None = None,
) -> Duel:
    """`outcome`: WIN, LOSE, TIE, FAILED or "flipped"."""
    a, b = BOTH[outcome]
    return Duel("hh", "ppo", f"p{i:04d}", source, Verdict(a), Verdict(b), *lengths, p_high)


def duels(wins: int, ties: int, losses: int, failed: int = 0, flipped: int = 0) -> list[Duel]:
    outcomes = (
        [WIN] * wins + [TIE] * ties + [LOSE] * losses + [FAILED] * failed + ["flipped"] * flipped
    )
    return [duel(outcome, i) for i, outcome in enumerate(outcomes)]


def swap(given: Sequence[Duel]) -> list[Duel]:
    """The same judgements with subject and opponent exchanged."""
    return [
        Duel(
            d.task,
            d.opponent,
            d.prompt_id,
            d.source,
            d.opponent_first,
            d.subject_first,
            d.opponent_tokens,
            d.subject_tokens,
            d.p_high,
        )
        for d in given
    ]


def prompts(n: int, tasks: Sequence[str] = ("hh",)) -> list[TaskPrompt]:
    return [
        TaskPrompt(
            task,
            "helpful",
            f"{task}-{i:03d}",
            f"Human: question {i}",
            f"question {i}",
            f"source_{i % 2}",
        )
        for task in tasks
        for i in range(n)
    ]


def answers(policy: str, asked: Sequence[TaskPrompt], *, markup: bool = False) -> list[Response]:
    return [
        Response(
            policy,
            p.task,
            p.prompt_id,
            f"answer {len(policy)}{policy[-1]} to {p.question} {MARKUP if markup else ''}",
            tokens=5 + (7 * i + len(policy)) % 11,
            finished=i % 5 != 0,
            figures={"score": i / 10, "kl": 0.5, "p_high": (i % 10) / 10},
        )
        for i, p in enumerate(asked)
    ]


def verdicts(
    opponents: Sequence[str], asked: Sequence[TaskPrompt], seed: int
) -> dict[tuple[str, str, str, bool], Verdict]:
    """Outcomes drawn evenly of WIN, LOSE, TIE, FAILED and flipped."""
    generator = np.random.Generator(np.random.PCG64(seed))
    result = {}
    for opponent in opponents:
        for p in asked:
            both = BOTH[list(BOTH)[int(generator.integers(len(BOTH)))]]
            for subject_first, choice in zip((True, False), both, strict=True):
                said = f"reason <b>{choice}</b>" if choice != FAILED else "HTTP 500 <script>"
                result[p.task, opponent, p.prompt_id, subject_first] = Verdict(choice, said)
    return result
