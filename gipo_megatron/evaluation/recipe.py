"""The recipe of an evaluation: policies, tasks, generation, judge. All problems are reported
together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gipo_megatron import registry
from gipo_megatron.components.rollout import Rollouts
from gipo_megatron.evaluation import judges
from gipo_megatron.evaluation.tasks import Task
from gipo_megatron.evaluation.types import RESERVED
from gipo_megatron.recipe import check, samplers
from gipo_megatron.recipe.compose import drafted, load_components
from gipo_megatron.recipe.draft import Draft, Found
from gipo_megatron.recipe.files import merged
from gipo_megatron.recipe.problems import Problem, RecipeErrors, suggest
from gipo_megatron.recipe.schema import (
    Composed,
    Count,
    Evaluation,
    Hardware,
    NotNegative,
    SharedModel,
)
from gipo_megatron.recipe.source import Block
from gipo_megatron.registry import component
from gipo_megatron.specs import Parallel, PathText, Precision

# models that measure responses: score, KL, inferred group
HELPERS = ("reward", "reference", "critic")
# keys of a sampler that are for training: an evaluation draws as `generation` describes
UNREAD = {f.name: f.default for f in registry.recipe_fields(Rollouts)}
_FILE_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Weights:
    """A model that is not trained."""

    load: PathText  # a checkpoint of this project, a Hugging Face folder or hub name


@dataclass(frozen=True)
class EvaluationBatch:
    # exactly one of the two is set: rows of one forward pass on one replica, or its tokens with
    # their padding, in which the longest row has room
    micro_batch: Count | None = 4
    micro_tokens: Count | None = None


@dataclass(frozen=True)
class Generation(Evaluation):
    """Settings of the draw of every policy's responses."""

    max_response: Count = 512  # tokens of a response, its end-of-text token included
    seed: NotNegative = 0  # a response's noise depends on it and on the prompt alone
    # prompts that all replicas together respond to at a time; each batch is then written to disk
    batch: Count = 64


@dataclass(frozen=True)
class Statistics:
    bootstrap: Count = 2000  # resamples behind each interval
    seed: NotNegative = 0  # of the resampling


@dataclass(frozen=True)
class EvaluationRun:
    # where everything of this evaluation is written; the same command continues it
    dir: PathText


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe(Composed):
    """A checked recipe of launch/evaluate.py: every key typed and complete."""

    policies: dict[str, Weights] = field(default_factory=dict)  # the first is the subject
    # []: all other policies; after composing, never empty
    opponents: list[str] = field(default_factory=list)
    models: dict[str, Weights] = field(default_factory=dict)
    model: SharedModel
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    batch: EvaluationBatch = field(default_factory=EvaluationBatch)
    data_root: PathText = "."
    tasks: list[Task] = field(default_factory=list)
    generation: Generation = field(default_factory=Generation)
    # what draws the responses; of its keys those that `generation` replaces are not read
    rollout: dict[str, Any] = component("rollout", "sampling")
    judge: dict[str, Any] = component("judge", "")  # what registry.build reads
    report: Statistics = field(default_factory=Statistics)
    run: EvaluationRun
    hardware: Hardware = field(default_factory=Hardware)
    plugins: list[str] = field(default_factory=list)

    @property
    def subject(self) -> str:
        return next(iter(self.policies))

    @property
    def data_parallel(self) -> int:
        return self.world // self.parallel.model


def is_evaluation(argv: Sequence[str], root: Path) -> bool:
    """Return True for a recipe of launch/evaluate.py: it has policies."""
    return "policies" in merged(argv, root)[0].children


def compose_evaluation(
    argv: Sequence[str], root: Path, world: int | None = None
) -> EvaluationRecipe:
    """Return the evaluation that a command line describes, checked; words, files and the number of
    processes are as in compose().

    Raises RecipeErrors with every problem found.
    """
    return checked(*merged(argv, root, world))


def checked(tree: Block, name: str, world: int = 0) -> EvaluationRecipe:
    """Return the typed evaluation of a merged tree. Raises RecipeErrors with every problem."""
    # Hardware fragments set how training saves memory, too; nothing is trained here.
    keys = {key: node for key, node in tree.children.items() if key != "memory"}
    load_components(Block({}, ""), [judges])
    draft, problems, hidden = drafted(Block(keys, tree.origin), EvaluationRecipe, world, _loads)
    problems += draft.found(PROBLEMS)
    if problems or hidden:
        raise RecipeErrors(name, problems or hidden)
    sections = draft.sections
    sections["opponents"] = sections["opponents"] or list(sections["policies"])[1:]
    warnings = tuple(map(str, draft.found((absent, samplers.served))))
    return EvaluationRecipe(
        **sections, name=name, world=draft.world, warnings=warnings, tree=pruned(draft.tree)
    )


def pruned(tree: Block) -> Block:
    """Return the tree without the sampler's keys that an evaluation does not read."""
    sampler = tree.children["rollout"]
    if not isinstance(sampler, Block):
        return tree
    read = {key: node for key, node in sampler.children.items() if key not in UNREAD}
    return Block({**tree.children, "rollout": Block(read, sampler.origin)}, tree.origin)


def _loads(tree: Block) -> dict[str, str]:
    """{key that names weights: the role that they are loaded as}"""
    found: dict[str, str] = {}
    for section in ("policies", "models"):
        block = tree.children.get(section)
        for name in block.children if isinstance(block, Block) else ():
            found[f"{section}.{name}.load"] = name if section == "models" else "actor"
    return found


# ------------------------------------------------------------------------------------------- checks


def policies(d: Draft) -> Found:
    """A subject and another policy to compare it with; names are file names."""
    if len(d.policies) < 2:
        what = f"{len(d.policies)} of them: the first is the subject, and it needs one other to be"
        fix = "policies: {new: {load: …}, old: {load: …}}"
        yield d.problem("policies", f"{what} compared with", fix)
    for name in d.policies:
        if not _FILE_NAME.fullmatch(name):
            what = "a policy's name becomes a file name: letters, digits, _ - ."
            yield d.problem(f"policies.{name}", what)


def opponents(d: Draft) -> Found:
    """Policies, other than the subject, each once."""
    others = list(d.policies)[1:]
    for name, count in Counter(d.opponents).items():
        if name not in d.policies:
            yield d.problem("opponents", f"there is no policy {name!r}", suggest(name, others))
        elif name not in others:
            what = f"{name!r} is the subject (the first policy): it is not compared with itself"
            yield d.problem("opponents", what, "remove it")
        elif count > 1:
            yield d.problem("opponents", f"{name!r} is listed {count} times")


def models(d: Draft) -> Found:
    """Known roles; weights that are trained."""
    for role in d.models:
        if role not in HELPERS:
            yield d.problem(f"models.{role}", "unknown role", suggest(role, HELPERS))
    for key, load in _all_loads(d.policies, d.models).items():
        if load == "random":
            fix = "give a checkpoint or a Hugging Face folder"
            yield d.problem(key, "cannot evaluate random weights", fix)


def _all_loads(policies: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, str]:
    """{key: load}"""
    loads = {f"policies.{name}.load": weights.load for name, weights in policies.items()}
    return loads | {f"models.{role}.load": weights.load for role, weights in models.items()}


def tasks(d: Draft) -> Found:
    """One task or more, with distinct names that can be file names."""
    if not d.tasks:
        fix = "tasks: [{name: hh_harmless, kind: harmless, data: …}]"
        yield d.problem("tasks", "none: there are no prompts", fix)
    for name, count in Counter(task.name for task in d.tasks).items():
        if count > 1:
            yield d.problem("tasks", f"{count} tasks are called {name!r}", "give each its own name")
        if name in RESERVED:
            what = f"a task cannot be called {name!r}: results.json uses that name"
            yield d.problem("tasks", what)
        if not _FILE_NAME.fullmatch(name):
            yield d.problem("tasks", f"{name!r}: a task's name is made of letters, digits, _ - .")


def lengths(d: Draft) -> Found:
    """Sequences fit into the model, responses into sequences."""
    positions, response = d.model.architecture.max_positions, d.generation.max_response
    for i, task in enumerate(d.tasks):
        key, where = f"tasks[{i}].max_length", d.tree.origin_of("tasks")
        if task.max_length > positions:
            what = f"{task.max_length} exceeds model.architecture.max_positions {positions}"
            yield Problem(key, what, where)
        if response >= task.max_length:
            room = f"leaves no room for a prompt beside generation.max_response {response}"
            yield Problem(key, f"{task.max_length} {room}", where)


def micro_batches(d: Draft) -> Found:
    """Rows or tokens limit a micro-batch, and the longest row is within the limit."""
    yield from check.limits(d)
    longest = max((task.max_length for task in d.tasks), default=0)
    yield from check.too_few_tokens(d, longest, "a row of a task's max_length")


def sampler(d: Draft) -> Found:
    """Keys of a sampler that an evaluation does not read."""
    for key, default in UNREAD.items():
        if (value := d.rollout.get(key, default)) != default:
            drawn = f"generation.{key}={value}" if hasattr(d.generation, key) else "remove it"
            what = f"{value!r} is not read: `generation` describes how responses are drawn"
            yield d.problem(f"rollout.{key}", what, drawn)


def judge(d: Draft) -> Found:
    """The models that the judge needs."""
    name = d.judge["name"]
    for role in getattr(registry.lookup("judge", name), "needs", ()):
        if role not in d.models:
            what = f"{name} needs models.{role}, which is not set"
            yield d.problem("judge.name", what, f"models.{role}.load=CHECKPOINT, or another judge")


def run(d: Draft) -> Found:
    """A folder to write to."""
    if not d.run.dir:
        yield d.problem("run.dir", "is empty", "run.dir=runs/evaluate")


PROBLEMS = (
    policies,
    opponents,
    models,
    tasks,
    lengths,
    micro_batches,
    sampler,
    judge,
    run,
    check.layout,
    check.architecture,
    check.vocabulary,
    check.precision,
    samplers.server,
)


def absent(d: Draft) -> Found:
    """Weights that are not on this machine. A recipe may be checked elsewhere; the launcher
    refuses."""
    yield from check.absent_weights(_all_loads(d.policies, d.models), d.run.dir, d.tree)


def missing_weights(recipe: EvaluationRecipe) -> list[Problem]:
    """Return the weights without which a launcher must not start."""
    loads = _all_loads(recipe.policies, recipe.models)
    return list(check.absent_weights(loads, recipe.run.dir, recipe.tree))
