"""Pairs to judge, comparisons from their verdicts, and results.json from the comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gipo_megatron.evaluation.statistics import compare, policy_figures
from gipo_megatron.evaluation.types import (
    RESERVED,
    Comparison,
    HeadToHead,
    Pair,
    PairOrder,
    Verdict,
)
from gipo_megatron.files import write_json


def pairs_in_both_orders(given: HeadToHead) -> dict[PairOrder, Pair]:
    """Return both orders of every prompt's pair, for every baseline.

    Raises KeyError if a response is missing.
    """
    responses, pairs = given.by_prompt, {}
    for p in given.prompts:
        for baseline in given.baselines:
            for model_first in (True, False):
                names = (given.model, baseline) if model_first else (baseline, given.model)
                first, second = (responses[name, p.task, p.prompt_id] for name in names)
                scores = {
                    f"{place}_score": response.figures["score"]
                    for place, response in (("first", first), ("second", second))
                    if "score" in response.figures
                }
                pairs[PairOrder(p.task, baseline, p.prompt_id, model_first)] = Pair(
                    p.task, p.kind, p.prompt_id, p.question, first.text, second.text, scores
                )
    return pairs


def comparisons_from_verdicts(
    given: HeadToHead, verdicts: Mapping[PairOrder, Verdict], *, sampled: bool = False
) -> list[Comparison]:
    """Return one Comparison per baseline and prompt, in that order.

    `sampled`: leave out prompts without a verdict. p_high of a prompt is the mean over all
    policies' responses that have one, so that it does not depend on the baseline.

    Raises ValueError if a response or a verdict is missing: the evaluation is incomplete.
    """
    responses = given.by_prompt
    high = {
        p: _p_high([responses.get((name, p.task, p.prompt_id)) for name in given.responses])
        for p in given.prompts
    }
    comparisons = []
    for baseline in given.baselines:
        for p in given.prompts:
            key = (p.task, baseline, p.prompt_id)
            one, other = (verdicts.get(PairOrder(*key, first)) for first in (True, False))
            if sampled and one is other is None:
                continue
            if one is None or other is None:
                raise ValueError(
                    f"{p.task}/{p.prompt_id}: {given.model} against {baseline} is not judged in"
                    " both orders"
                )
            for name in (given.model, baseline):
                if (name, p.task, p.prompt_id) not in responses:
                    raise ValueError(f"{p.task}/{p.prompt_id}: no response of {name}")
            mine, theirs = (
                responses[name, p.task, p.prompt_id].tokens for name in (given.model, baseline)
            )
            comparisons.append(Comparison(*key, p.source, one, other, mine, theirs, high[p]))
    return comparisons


def _p_high(responses: Sequence[Any]) -> float | None:
    values = [r.figures["p_high"] for r in responses if r is not None and "p_high" in r.figures]
    return math.fsum(values) / len(values) if values else None


def build_results(
    given: HeadToHead,
    comparisons: Sequence[Comparison],
    judge_about: Mapping[str, Any],
    *,
    bootstrap: int,
    seed: int,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Return {subject, judge, bootstrap, incomplete, warnings, tasks: {task: {baseline: cell}},
    policies: {name: {task: figures}}}.

    Counts are over the n judged prompts, ci95 in shares of n. `bootstrap`: resamples.
    """
    tasks = list(dict.fromkeys(prompt.task for prompt in given.prompts))
    cells: dict[tuple[str, str], list[Comparison]] = {
        (task, baseline): [] for task in tasks for baseline in given.baselines
    }
    for comparison in comparisons:
        cells[comparison.task, comparison.baseline].append(comparison)
    compared = {
        task: {
            baseline: compare(cells[task, baseline], resamples=bootstrap, seed=seed)
            for baseline in given.baselines
        }
        for task in tasks
    }
    return {
        "subject": given.model,
        "judge": dict(judge_about),
        "bootstrap": {"resamples": bootstrap, "seed": seed},
        "incomplete": incomplete(compared),
        "warnings": list(warnings),
        "tasks": compared,
        "policies": {
            name: {
                task: policy_figures([r for r in given.responses[name] if r.task == task])
                for task in tasks
            }
            for name in (given.model, *given.baselines)
        },
    }


def incomplete(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the cells of which more than half of the prompts failed, in words.

    A prompt fails if either verdict on it failed. Without any judged prompt, all cells.
    """
    judged = any(cell["n"] for cells in tasks.values() for cell in cells.values())
    return [
        f"{task} against {baseline}: {cell['n']} of {cell['n'] + cell['failed']} prompts judged"
        for task, cells in tasks.items()
        for baseline, cell in cells.items()
        if cell["failed"] > cell["n"] or not judged
    ]


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write {task: {baseline: cell}, subject, judge, bootstrap, …}, all or nothing.

    The tasks are at the top level, beside RESERVED. Raises ValueError for NaN or infinity.
    """
    beside = {name: results[name] for name in RESERVED}
    write_json(path, {**results["tasks"], **beside})
