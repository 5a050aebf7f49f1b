"""Answers the planner's tests in a process of its own, all in one start: evaluate.py CASES.json
writes CASES.out.json.

A plan pretends to be a rank of another world, which a process that is in a process group cannot.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.planning.planner import Planner, build_shards
from gipo_megatron.planning.report import plan_text
from gipo_megatron.planning.verdict import judge
from gipo_megatron.recipe.compose import compose
from gipo_megatron.specs import Architecture, Parallel, Precision

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
KINDS: dict[str, tuple[str | None, bool]] = {
    "actor": (None, True),
    "critic": ("value", True),
    "reference": (None, False),
    "reward": ("score", False),
}


def shards(case: dict[str, Any]) -> dict[str, Any]:
    """Role -> its shard's numbers, on one rank of one world."""
    place = (
        Architecture(**case["architecture"]),
        Parallel(**case["parallel"]),
        Precision(case["dtype"]),
        case["world"],
        case["rank"],
    )
    built = build_shards(*place, set(KINDS.values()))
    return {role: dataclasses.asdict(built[kind]) for role, kind in KINDS.items()}


def plan(case: dict[str, Any]) -> dict[str, Any]:
    """What a plan says in numbers."""
    recipe = compose(case["plan"], RECIPES)
    planner = Planner()
    found = planner.plan(recipe)
    verdict = judge(found, planner, lambda words: compose([*case["plan"], *words], RECIPES))
    phases = {
        phase.name: [phase.state.total, phase.work.peak, phase.moved]
        for phase in found.heaviest.phases
    }
    return {
        "parameters": found.parameters,
        "stage": found.heaviest.shard.stage,
        "phases": phases,
        "worst": found.heaviest.worst.name,
        "peak": found.heaviest.worst.peak,
        "limit": found.limit,
        "groups": found.groups,
        "fits": verdict.fits,
        "warnings": verdict.warnings,
        "change": None
        if verdict.change is None
        else [verdict.change.words, verdict.change.plan.heaviest.worst.peak],
        "flops": 0 if found.time is None else found.time.flops,
        "tokens": found.batch.rows * found.batch.sequences_per_row * found.batch.max_length,
        "batch": found.batch.lines(),
        "rows": [max(phase.work.rows for phase in stage.phases) for stage in found.footprints],
        "seconds": {}
        if found.time is None
        else {work.name: work.seconds for work in found.time.works},
        "saving": found.saving,
    }


def verdicts(names: list[str]) -> dict[str, Any]:
    """Recipe -> [fits, warnings]; models of one shape are built once."""
    planner = Planner()

    def verdict(argv: list[str]) -> list[Any]:
        found = judge(
            planner.plan(compose(argv, RECIPES)),
            planner,
            lambda words: compose([*argv, *words], RECIPES),
        )
        return [found.fits, found.warnings]

    return {name: verdict([f"recipe={name}"]) for name in names}


def answer(case: dict[str, Any]) -> Any:
    try:
        if "verdicts" in case:
            return verdicts(case["verdicts"])
        return (
            shards(case)
            if "architecture" in case
            else plan(case)
            if "plan" in case
            else plan_text(case["text"], RECIPES)
        )
    except UserError as error:
        return {"error": str(error)}


def main() -> None:
    cases = Path(sys.argv[1])
    answers = {name: answer(case) for name, case in json.loads(cases.read_text()).items()}
    cases.with_suffix(".out.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
