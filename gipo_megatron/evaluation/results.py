"""From responses and verdicts to duels, and from duels to results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gipo_megatron.evaluation.statistics import compare, policy_figures
from gipo_megatron.evaluation.types import Duel, Response, TaskPrompt, Verdict
from gipo_megatron.files import write_json

Presentation = tuple[str, str, str, bool]  # task, opponent, prompt_id, subject_first

# names in results.json that no task may have
RESERVED = ("subject", "judge", "bootstrap", "policies")


def duels_from_verdicts(
    subject: str,
    opponents: Sequence[str],
    prompts: Sequence[TaskPrompt],
    responses: Mapping[str, Sequence[Response]],
    verdicts: Mapping[Presentation, Verdict],
    *,
    sampled: bool = False,
) -> list[Duel]:
    """One Duel per opponent and prompt, in that order. `sampled`: prompts without any verdict are
    left out (people judge a sample).

    p_high of a prompt is the mean over all policies' responses that have one: the same group
    whoever is compared.

    Raises ValueError where a response or a verdict is missing: an evaluation that is not finished
    has no result.
    """
    answers = {name: {(r.task, r.prompt_id): r for r in rows} for name, rows in responses.items()}
    keys = [(p.task, p.prompt_id) for p in prompts]
    high = {key: _p_high([rows[key] for rows in answers.values() if key in rows]) for key in keys}
    duels = []
    for opponent in opponents:
        for prompt in prompts:
            task, prompt_id = prompt.task, prompt.prompt_id
            both = [
                verdicts.get((task, opponent, prompt_id, subject_first))
                for subject_first in (True, False)
            ]
            if sampled and both == [None, None]:
                continue
            if both[0] is None or both[1] is None:
                raise ValueError(
                    f"{task}/{prompt_id}: {subject} against {opponent} is not judged in both orders"
                )
            pair = [answers[name].get((task, prompt_id)) for name in (subject, opponent)]
            if pair[0] is None or pair[1] is None:
                raise ValueError(
                    f"{task}/{prompt_id}: no response of {subject if pair[0] is None else opponent}"
                )
            duels.append(
                Duel(
                    task,
                    opponent,
                    prompt_id,
                    prompt.source,
                    both[0],
                    both[1],
                    pair[0].tokens,
                    pair[1].tokens,
                    high[task, prompt_id],
                )
            )
    return duels


def _p_high(responses: Sequence[Response]) -> float | None:
    values = [r.figures["p_high"] for r in responses if "p_high" in r.figures]
    return math.fsum(values) / len(values) if values else None


def build_results(
    subject: str,
    opponents: Sequence[str],
    prompts: Sequence[TaskPrompt],
    responses: Mapping[str, Sequence[Response]],
    duels: Sequence[Duel],
    judge_about: Mapping[str, Any],
    *,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """results.json: counts over n = judged prompts, ci95 in shares of n; the subject's figures and
    the opponents' by task."""
    tasks = list(dict.fromkeys(prompt.task for prompt in prompts))
    cells: dict[tuple[str, str], list[Duel]] = {
        (task, opponent): [] for task in tasks for opponent in opponents
    }
    for duel in duels:
        cells[duel.task, duel.opponent].append(duel)
    return {
        "subject": subject,
        "judge": dict(judge_about),
        "bootstrap": {"resamples": bootstrap, "seed": seed},
        "tasks": {
            t: {o: compare(cells[t, o], resamples=bootstrap, seed=seed) for o in opponents}
            for t in tasks
        },
        "policies": {
            name: {
                task: policy_figures([r for r in responses[name] if r.task == task])
                for task in tasks
            }
            for name in (subject, *opponents)
        },
    }


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """{task: {opponent: cell}, subject, judge, bootstrap, policies}: the tasks stand at the top,
    beside RESERVED. All or nothing.

    Raises ValueError for a number that JSON does not know (NaN, infinity).
    """
    beside = {name: results[name] for name in RESERVED}
    write_json(path, {**results["tasks"], **beside})
