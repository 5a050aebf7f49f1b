"""Predictions of the planner for the steps that parts measure. Made on the CPU, beforehand: a plan
pretends to be another world."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gipo_megatron.planning.planner import Planner
from gipo_megatron.recipe.compose import compose
from gipo_megatron.specs import Architecture
from tools.gpu.bench import GIB
from tools.gpu.models import ONE_B, SEVEN_B, Step, shape

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True)
class Case:
    """A phase of a recipe's plan, for models of the step's architecture."""

    step: Step
    phase: str
    recipe: str = "hh_sft"
    words: tuple[str, ...] = ()


def step(whole: Architecture, tiny: bool, num_layers: int | None = None, **more: Any) -> Step:
    """16 rows of 2048 tokens, four at a time."""
    sizes = (
        {"rows": 4, "micro_batch": 2, "length": 32}
        if tiny
        else {"rows": 16, "micro_batch": 4, "length": 2048}
    )
    return Step(shape(whole, tiny, num_layers), **{**sizes, **more})


OFFLOAD = tuple(f"models.{role}.offload=cpu" for role in ("actor", "critic", "reward", "reference"))
RESPONSES = 64  # prompts of one rollout


def cases(tiny: bool) -> Mapping[str, Case]:
    """Figure -> what is planned, and measured, for it."""
    one = replace(step(ONE_B, tiny), rows=4 if tiny else 8)
    few = replace(one, architecture=shape(ONE_B, tiny, 2))
    rollout = replace(one, rows=8 if tiny else RESPONSES, length=32 if tiny else 1024)
    found = {
        f"update, recompute {kind}": Case(replace(one, recompute=kind), "actor update")
        for kind in ("none", "selective", "full")
    }
    found |= {
        "log-probs, offloaded": Case(few, "actor log-probs", "hh_ppo_kl", OFFLOAD),
        "update, offloaded": Case(few, "actor update", "hh_ppo_kl", OFFLOAD),
        "save": Case(few, "save"),
        "rollout": Case(rollout, "rollout", "hh_ppo_kl", OFFLOAD),
    }
    for name, whole in SLOPES.items():
        for layers in LAYERS:
            found[f"{name}, {layers} layers"] = Case(step(whole, tiny, layers), "actor update")
    found["FP8 tensorwise"] = Case(step(SEVEN_B, tiny, LAYERS[0], fp8="tensorwise"), "actor update")
    return found


SLOPES = {"7B": SEVEN_B, "1B": ONE_B}
LAYERS = (2, 8)


def fingerprint() -> str:
    """Of all cases: a prediction of others is of no use."""
    return hashlib.sha256(repr([cases(False), cases(True)]).encode()).hexdigest()


def predict(tiny: bool) -> dict[str, float]:
    """Figure -> GiB at most in that phase."""
    planner = Planner()
    found = {}
    for name, case in cases(tiny).items():
        plan = planner.plan(compose(words(case), RECIPES, world=1))
        peaks = [phase.peak for phase in plan.heaviest.phases if case.phase in phase.name]
        if peaks:
            found[name] = max(peaks) / GIB
    return found


def words(case: Case) -> list[str]:
    """The command line of the recipe that is planned."""
    s = case.step
    settings: dict[str, Any] = {
        "recipe": case.recipe,
        **{
            f"model.architecture.{f.name}": value(getattr(s.architecture, f.name))
            for f in fields(Architecture)
        },
        "model.hub": "",
        "model.tokenizer": "bytes",
        "parallel": "{tensor: 1, pipeline: 1, virtual_pipeline: 1, sequence: false}",
        "hardware": "{gpus: 1, gpu_memory_gib: 80}",
        "batch.micro_batch": s.micro_batch,
        "batch.micro_tokens": "null",
        "batch.minibatch": s.rows,
        "data.max_length": s.length,
        "data.max_response": s.length // 2,
        "memory.recompute": s.recompute,
        "precision.fp8": s.fp8,
    }
    loads = ("actor", "reward") if case.recipe == "hh_ppo_kl" else ("actor",)
    settings |= {f"models.{role}.load": "random" for role in loads}
    if case.recipe == "hh_ppo_kl":
        settings |= {"batch.prompts": s.rows, "batch.responses": 1}
    return [*(f"{key}={value}" for key, value in settings.items()), *case.words]


def value(x: Any) -> Any:
    """As YAML."""
    return "null" if x is None else str(x).lower() if isinstance(x, bool) else x
