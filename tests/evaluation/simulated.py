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
    Comparison,
    HeadToHead,
    PairOrder,
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


def comparison(
    outcome: str,
    i: int,
    *,
    lengths: tuple[int, int] = (10, 10),
    source: str = "",
    p_high: float | None = None,
) -> Comparison:
    """`outcome`: WIN, LOSE, TIE, FAILED or "flipped"."""
    a, b = BOTH[outcome]
    return Comparison("hh", "ppo", f"p{i:04d}", source, Verdict(a), Verdict(b), *lengths, p_high)


def comparisons(
    wins: int, ties: int, losses: int, failed: int = 0, flipped: int = 0
) -> list[Comparison]:
    outcomes = (
        [WIN] * wins + [TIE] * ties + [LOSE] * losses + [FAILED] * failed + ["flipped"] * flipped
    )
    return [comparison(outcome, i) for i, outcome in enumerate(outcomes)]


def swap(given: Sequence[Comparison]) -> list[Comparison]:
    """The same judgements with model and baseline exchanged."""
    return [
        Comparison(
            c.task,
            c.baseline,
            c.prompt_id,
            c.source,
            c.baseline_first,
            c.model_first,
            c.baseline_tokens,
            c.model_tokens,
            c.p_high,
        )
        for c in given
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


def head_to_head(
    model: str, baselines: Sequence[str], asked: Sequence[TaskPrompt], *, markup: bool = False
) -> HeadToHead:
    responses = {name: answers(name, asked, markup=markup) for name in (model, *baselines)}
    return HeadToHead(model, baselines, asked, responses)


def verdicts(
    baselines: Sequence[str], asked: Sequence[TaskPrompt], seed: int
) -> dict[PairOrder, Verdict]:
    """Outcomes drawn evenly of WIN, LOSE, TIE, FAILED and flipped."""
    generator = np.random.Generator(np.random.PCG64(seed))
    result = {}
    for baseline in baselines:
        for p in asked:
            both = BOTH[list(BOTH)[int(generator.integers(len(BOTH)))]]
            for model_first, choice in zip((True, False), both, strict=True):
                text = f"reason <b>{choice}</b>" if choice != FAILED else "HTTP 500 <script>"
                order = PairOrder(p.task, baseline, p.prompt_id, model_first)
                result[order] = Verdict(choice, text)
    return result
