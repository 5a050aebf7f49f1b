"""The recipe of an evaluation: which policies answer which tasks, drawn how, judged by whom. All
problems come back together."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gipo_megatron.evaluation import judges
from gipo_megatron.evaluation.results import RESERVED
from gipo_megatron.evaluation.tasks import Task
from gipo_megatron.evaluation.types import KINDS
from gipo_megatron.recipe import check, registry
from gipo_megatron.recipe.architecture import KEY as ARCHITECTURE
from gipo_megatron.recipe.architecture import read_architecture
from gipo_megatron.recipe.check import Found, Tree
from gipo_megatron.recipe.compose import load_components, merged, resolve
from gipo_megatron.recipe.problems import Problem, RecipeErrors, suggest
from gipo_megatron.recipe.registry import OneOf, Range, component
from gipo_megatron.recipe.schema import (
    RANGES,
    Count,
    Evaluation,
    Hardware,
    ModelSpec,
    NotNegative,
    composed,
)
from gipo_megatron.recipe.source import Block, to_yaml
from gipo_megatron.recipe.validate import Completion, Conversion
from gipo_megatron.specs import Parallel, Precision

# what may be measured beside the policies: score, KL, inferred group
HELPERS = ("reward", "reference", "critic")
_FILE_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Weights:
    """A model that only answers."""

    load: str  # a checkpoint of this project, a Hugging Face folder or hub name


@dataclass(frozen=True)
class EvaluationBatch:
    micro_batch: Count = 4  # rows of one forward pass on one replica


@dataclass(frozen=True)
class Generation(Evaluation):
    """How every policy's responses are drawn."""

    max_response: Count = 512  # tokens of a response, its end-of-text token included
    seed: NotNegative = 0  # with the prompt, all that a response's noise depends on
    # prompts answered together by all replicas; responses are on disk after each batch
    batch: Count = 64


@dataclass(frozen=True)
class Statistics:
    bootstrap: Count = 2000  # resamples behind each interval
    seed: NotNegative = 0  # of the resampling


@dataclass(frozen=True)
class EvaluationRun:
    # where everything of this evaluation is written; the same command continues what is there
    dir: str


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """A checked recipe of launch/evaluate.py: every key typed and complete."""

    policies: dict[str, Weights] = field(default_factory=dict)  # the first is the subject
    # []: all other policies; after composing, never empty
    opponents: list[str] = field(default_factory=list)
    models: dict[str, Weights] = field(default_factory=dict)
    model: ModelSpec
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    batch: EvaluationBatch = field(default_factory=EvaluationBatch)
    data_root: str = "."
    tasks: list[Task] = field(default_factory=list)
    generation: Generation = field(default_factory=Generation)
    judge: dict[str, Any] = component("judge", "")  # what registry.build reads
    report: Statistics = field(default_factory=Statistics)
    run: EvaluationRun
    hardware: Hardware = field(default_factory=Hardware)
    plugins: list[str] = field(default_factory=list)

    name: str = composed()
    world: int = composed()  # processes the checks were made for
    warnings: tuple[str, ...] = composed()
    tree: Block = composed()  # every value with its origin

    @property
    def subject(self) -> str:
        return next(iter(self.policies))

    @property
    def data_parallel(self) -> int:
        return self.world // self.parallel.model

    def to_yaml(self, origins: bool = True) -> str:
        """The expanded recipe, itself a recipe; with origins as comments."""
        return to_yaml(self.tree, origins)


RANGES[Task] = {"kind": OneOf(*KINDS), "prompts": Range(1), "max_length": Range(2)}


def is_evaluation(name: str) -> bool:
    """Whether a recipe's name says that launch/evaluate.py runs it: `tiny/evaluate`,
    `hh_evaluate`."""
    return Path(name).stem.endswith("evaluate")


def compose_evaluation(
    argv: Sequence[str], root: Path, world: int | None = None
) -> EvaluationRecipe:
    """The evaluation a command line describes, checked; words, files and the number of processes
    are as in compose().

    Raises RecipeErrors with every problem found.
    """
    tree, name, world = merged(argv, root, world)
    # Hardware fragments say how training saves memory, too; nothing is trained here.
    tree = Block({key: node for key, node in tree.children.items() if key != "memory"}, tree.origin)
    problems = load_components(tree)
    for module in pkgutil.iter_modules(judges.__path__):
        importlib.import_module(f"{judges.__name__}.{module.name}")
    completion, conversion = Completion(), Conversion()
    # which weights are loaded; its problems come again below
    draft = resolve(Completion().complete(tree, EvaluationRecipe), [])
    reading = read_architecture(tree, draft, _loads(draft))
    problems += reading.problems
    tree = resolve(completion.complete(reading.tree, EvaluationRecipe), completion.problems)
    implied = [
        p
        for p in completion.problems
        if reading.settled and not p.known and p.key.startswith(f"{ARCHITECTURE}.")
    ]
    problems += [p for p in completion.problems if p not in implied]
    sections = {
        f.name: conversion.section(tree, EvaluationRecipe, f.name)
        for f in registry.recipe_fields(EvaluationRecipe)
    }
    sections["judge"] = conversion.component(tree.children["judge"], "judge", ("judge",))
    problems += conversion.problems
    world = world or check.default_world(sections["hardware"], sections["parallel"])
    available = {**sections, "world": world, "tree": Tree(tree)}
    for key in ("policies", "models"):
        if sections[key] is not None and None in sections[key].values():
            available[key] = None
    problems += check.applied(PROBLEMS, available)
    if problems or implied:
        raise RecipeErrors(name, problems or implied)
    sections["opponents"] = sections["opponents"] or list(sections["policies"])[1:]
    warnings = tuple(str(problem) for problem in check.applied((absent,), available))
    return EvaluationRecipe(**sections, name=name, world=world, warnings=warnings, tree=tree)


def _loads(draft: Block) -> dict[str, str]:
    """{key that names weights: the role that they are loaded as}"""
    found: dict[str, str] = {}
    for section in ("policies", "models"):
        block = draft.children[section]
        names = block.children if isinstance(block, Block) else {}
        found |= {
            f"{section}.{name}.load": name if section == "models" else "actor" for name in names
        }
    return found


# ------------------------------------------------------------------------------------------- checks


def policies(policies: Mapping[str, Weights], tree: Tree) -> Found:
    """A subject and somebody to compare it with; names become file names."""
    if len(policies) < 2:
        what = (
            f"{len(policies)} of them: the first is the subject, and it needs one other to be"
            " compared with"
        )
        yield Problem(
            "policies", what, tree.origin("policies"), "policies: {gipo: {load: …}, sft: {load: …}}"
        )
    for name in policies:
        if not _FILE_NAME.fullmatch(name):
            what = "a policy's name becomes a file name: letters, digits, _ - ."
            yield Problem(f"policies.{name}", what, tree.origin(f"policies.{name}"))


def opponents(policies: Mapping[str, Weights], opponents: Sequence[str], tree: Tree) -> Found:
    """Policies, other than the subject, each once."""
    others, where = list(policies)[1:], tree.origin("opponents")
    for name, count in Counter(opponents).items():
        if name not in policies:
            yield Problem("opponents", f"there is no policy {name!r}", where, suggest(name, others))
        elif name not in others:
            yield Problem(
                "opponents",
                f"{name!r} is the subject (the first policy): it is not compared with itself",
                where,
                "remove it",
            )
        elif count > 1:
            yield Problem("opponents", f"{name!r} is given {count} times", where)


def models(policies: Mapping[str, Weights], models: Mapping[str, Weights], tree: Tree) -> Found:
    """Known roles, and weights that somebody trained."""
    for role in models:
        if role not in HELPERS:
            yield Problem(
                f"models.{role}",
                "unknown role",
                tree.origin(f"models.{role}"),
                suggest(role, HELPERS),
            )
    for section, group in (("policies", policies), ("models", models)):
        for name, weights in group.items():
            if weights.load == "random":
                key = f"{section}.{name}.load"
                yield Problem(
                    key,
                    "random weights say nothing",
                    tree.origin(key),
                    "give a checkpoint or a Hugging Face folder",
                )


def tasks(tasks: Sequence[Task], tree: Tree) -> Found:
    where = tree.origin("tasks")
    if not tasks:
        yield Problem(
            "tasks",
            "none: nothing to answer",
            where,
            "tasks: [{name: hh_harmless, kind: harmless, data: …}]",
        )
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            yield Problem(
                "tasks", f"{count} tasks are called {name!r}", where, "give each its own name"
            )
        if name in RESERVED:
            yield Problem(
                "tasks",
                f"a task cannot be called {name!r}: results.json has that name for something else",
                where,
            )
        if not _FILE_NAME.fullmatch(name):
            yield Problem(
                "tasks", f"{name!r}: a task's name is made of letters, digits, _ - .", where
            )


def lengths(tasks: Sequence[Task], model: ModelSpec, generation: Generation, tree: Tree) -> Found:
    """Sequences fit into the model, responses into sequences."""
    positions, response = model.architecture.max_positions, generation.max_response
    for i, task in enumerate(tasks):
        if task.max_length > positions:
            what = f"{task.max_length} exceeds model.architecture.max_positions {positions}"
            yield Problem(f"tasks[{i}].max_length", what, tree.origin("tasks"))
        if response >= task.max_length:
            what = (
                f"{task.max_length} leaves no room for a prompt beside generation.max_response"
                f" {response}"
            )
            yield Problem(f"tasks[{i}].max_length", what, tree.origin("tasks"))


def judge(judge: Mapping[str, Any], models: Mapping[str, Weights], tree: Tree) -> Found:
    if judge["name"] == "reward_model" and "reward" not in models:
        fix = "models.reward.load=CHECKPOINT, or another judge"
        yield Problem(
            "judge.name",
            "reward_model compares scores, and there is no models.reward to score with",
            tree.origin("judge.name"),
            fix,
        )


def run(run: EvaluationRun, tree: Tree) -> Found:
    if not run.dir:
        yield Problem("run.dir", "is empty", tree.origin("run.dir"), "run.dir=runs/evaluate")


PROBLEMS = (
    policies,
    opponents,
    models,
    tasks,
    lengths,
    judge,
    run,
    check.layout,
    check.architecture,
    check.vocabulary,
    check.precision,
)


def absent(
    policies: Mapping[str, Weights], models: Mapping[str, Weights], run: EvaluationRun, tree: Tree
) -> Found:
    """Weights that are not on this machine. A recipe may be checked elsewhere; the launcher
    refuses."""
    for section, group in (("policies", policies), ("models", models)):
        for name, weights in group.items():
            if not check.may_be_hub(weights.load, run.dir) and not Path(weights.load).exists():
                key = f"{section}.{name}.load"
                yield Problem(
                    key,
                    f"{weights.load!r} is not on this machine",
                    tree.origin(key),
                    "train that stage first, or give another path",
                )


def missing_weights(recipe: EvaluationRecipe) -> list[Problem]:
    """What a launcher must refuse to start without."""
    return list(absent(recipe.policies, recipe.models, recipe.run, Tree(recipe.tree)))
