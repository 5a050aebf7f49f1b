"""Makes all plans of the tests in one process: evaluate.py CASES.json writes CASES.out.json.

A plan takes the place of a rank of another world; a process that is in a process group cannot.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.planning.planner import Plan, Planner, build_shards
from gipo_megatron.planning.report import render
from gipo_megatron.planning.verdict import Verdict, judge
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.specs import AdapterSpec, Architecture, Parallel, Precision

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PLANNER = Planner()
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
    adapter = AdapterSpec(rank=case.get("rank of adapters", 0))
    kinds = {role: (*kind, adapter) for role, kind in KINDS.items()}
    built = build_shards(*place, set(kinds.values()))
    return {role: dataclasses.asdict(built[kind]) for role, kind in kinds.items()}


def judged(argv: list[str]) -> tuple[Plan, Verdict]:
    """Models of one shape are built once for all cases."""

    def vary(words: Sequence[str]) -> Recipe:
        return compose([*argv, *words], RECIPES)

    found = PLANNER.plan(vary(()))
    return found, judge(found, PLANNER, vary)


def plan(case: dict[str, Any]) -> dict[str, Any]:
    """A plan in numbers, and as text."""
    found, verdict = judged(case["plan"])
    phases = {
        phase.name: [sum(phase.state), phase.work.peak, phase.moved]
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
        "tokens": found.iteration.tokens(found.iteration.calls[0]),
        "batch": found.iteration.lines(),
        "rows": [max(phase.work.rows for phase in stage.phases) for stage in found.footprints],
        "seconds": {}
        if found.time is None
        else {work.name: work.seconds for work in found.time.works},
        "saving": found.saving,
        "server": [{phase.server for phase in stage.phases}.pop() for stage in found.footprints],
        "server_rows": 0 if found.server is None else found.server.rows,
        "text": render(found, verdict),
    }


def verdicts(names: list[str]) -> dict[str, Any]:
    """Recipe -> [fits, warnings]."""
    found = {name: judged([f"recipe={name}"])[1] for name in names}
    return {name: [verdict.fits, verdict.warnings] for name, verdict in found.items()}


def answer(case: dict[str, Any]) -> Any:
    try:
        if "verdicts" in case:
            return verdicts(case["verdicts"])
        return shards(case) if "architecture" in case else plan(case)
    except UserError as error:
        return {"error": str(error)}


def main() -> None:
    cases = Path(sys.argv[1])
    answers = {name: answer(case) for name, case in json.loads(cases.read_text()).items()}
    cases.with_suffix(".out.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
