"""Checks across sections, before any model is touched: does the world factor, do layers, heads and
batches divide, is every key read?

Each check names the sections it needs; it is skipped while one of them is wrong in itself.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gipo_megatron.data.config import DataConfig
from gipo_megatron.recipe import registry
from gipo_megatron.recipe.needs import ROLLOUT_KEYS, Needs, is_role
from gipo_megatron.recipe.problems import Problem, suggest
from gipo_megatron.recipe.schema import (
    ROLES,
    TRAINING_KEYS,
    Batch,
    Hardware,
    ModelConfig,
    ModelSpec,
    Recipe,
    Run,
)
from gipo_megatron.recipe.source import DEFAULT, Block, Node
from gipo_megatron.specs import Parallel, Precision

Found = Iterator[Problem]


@dataclass(frozen=True)
class Tree:
    """Where keys were written."""

    root: Block

    def origin(self, key: str) -> str:
        node: Node = self.root
        for part in key.split("."):
            if not isinstance(node, Block) or part not in node.children:
                return ""
            node = node.children[part]
        return node.origin

    def written(self, key: str) -> bool:
        return self.origin(key) not in ("", DEFAULT)


@dataclass
class Report:
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def default_world(hardware: Hardware | None, parallel: Parallel | None) -> int:
    if hardware is not None and hardware.gpus:
        return hardware.gpus
    return parallel.model if parallel is not None else 1


def cross_check(sections: dict[str, Any], tree: Block, needs: Needs, world: int) -> Report:
    """Every check whose sections are sound."""
    available = {**sections, "needs": needs, "world": world, "tree": Tree(tree)}
    if sections["models"] is not None and None in sections["models"].values():
        available["models"] = None
    return Report(list(applied(PROBLEMS, available)), list(applied(WARNINGS, available)))


def applied(checks: Sequence[Callable[..., Found]], available: Mapping[str, Any]) -> Found:
    """What the checks find whose sections (their parameters, by name) are sound, not None."""
    for check in checks:
        arguments = {name: available[name] for name in inspect.signature(check).parameters}
        if all(value is not None for value in arguments.values()):
            yield from check(**arguments)


# ----------------------------------------------------------------------------------------- problems


def roles(models: dict[str, ModelConfig], needs: Needs, tree: Tree) -> Found:
    """Each model that is asked for is there; trained ones have a learning rate, the others none."""
    for role in needs.roles:
        if role not in models:
            yield Problem(
                f"models.{role}.load", "missing", "", f"this algorithm asks for a model {role!r}"
            )
    for role, config in models.items():
        if not is_role(role):
            known = [*ROLES, "reward_<name>"]
            yield Problem(
                f"models.{role}",
                "unknown role",
                tree.origin(f"models.{role}"),
                suggest(role, known),
            )
        elif role in needs.trained and config.lr is None:
            yield Problem(
                f"models.{role}.lr",
                "missing: this algorithm trains it",
                tree.origin(f"models.{role}"),
                f"models.{role}.lr=1e-6",
            )
        elif role in needs.roles and role not in needs.trained:
            for key in TRAINING_KEYS:
                if tree.written(f"models.{role}.{key}"):
                    what = "not read: this algorithm does not train it"
                    yield Problem(
                        f"models.{role}.{key}",
                        what,
                        tree.origin(f"models.{role}.{key}"),
                        "remove it",
                    )


def layout(parallel: Parallel, world: int, tree: Tree) -> Found:
    """tensor x pipeline x data = world"""
    if world % parallel.model:
        yield Problem(
            "parallel",
            f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × data ? ≠ world {world}:"
            f" {world} is no multiple of {parallel.model}",
            tree.origin("parallel.tensor"),
            f"start a multiple of {parallel.model} processes, or change parallel.tensor or"
            " parallel.pipeline",
        )
    if parallel.sequence and parallel.tensor == 1:
        yield Problem(
            "parallel.sequence",
            "needs parallel.tensor above 1",
            tree.origin("parallel.sequence"),
            "parallel.sequence=false",
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        where = tree.origin("parallel.virtual_pipeline")
        yield Problem(
            "parallel.virtual_pipeline",
            "needs parallel.pipeline above 1",
            where,
            "parallel.virtual_pipeline=1",
        )


def architecture(model: ModelSpec, parallel: Parallel, tree: Tree) -> Found:
    """Heads, key-value heads and the feed-forward width split over tensor ranks, layers over
    pipeline chunks."""
    shape = model.architecture
    chunks = parallel.pipeline * parallel.virtual_pipeline
    rows = [
        ("num_heads", "num_kv_heads", shape.num_kv_heads, f"num_kv_heads {shape.num_kv_heads}"),
        ("num_heads", "tensor", parallel.tensor, f"tensor {parallel.tensor}"),
        ("num_kv_heads", "tensor", parallel.tensor, f"tensor {parallel.tensor}"),
        ("ffn_hidden_size", "tensor", parallel.tensor, f"tensor {parallel.tensor}"),
        (
            "num_layers",
            "pipeline",
            chunks,
            (
                f"pipeline {parallel.pipeline} × virtual_pipeline {parallel.virtual_pipeline} ="
                f" {chunks}"
            ),
        ),
    ]
    for key, _, divisor, name in rows:
        value = getattr(shape, key)
        if value % divisor:
            where = tree.origin(f"model.architecture.{key}")
            yield Problem(
                f"model.architecture.{key}",
                f"{value} does not divide by {name}",
                where,
                _divisors(value),
            )
    if shape.head_dim % 2:
        yield Problem(
            "model.architecture.head_dim",
            "must be even (rotary positions)",
            tree.origin("model.architecture.head_dim"),
        )


def _divisors(value: int) -> str:
    return (
        f"divisors of {value}:"
        f" {', '.join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)}"
    )


def lengths(model: ModelSpec, data: DataConfig, tree: Tree) -> Found:
    """Sequences fit into the model, responses into sequences."""
    positions = model.architecture.max_positions
    if data.max_length > positions:
        where = tree.origin("data.max_length")
        yield Problem(
            "data.max_length",
            f"{data.max_length} exceeds model.architecture.max_positions {positions}",
            where,
        )
    if data.max_response >= data.max_length:
        what = (
            f"{data.max_response} leaves no room for a prompt in data.max_length {data.max_length}"
        )
        yield Problem("data.max_response", what, tree.origin("data.max_response"))


def planted(data: DataConfig, tree: Tree) -> Found:
    """Generated data come from no file."""
    if data.format == "planted" and data.path:
        yield Problem(
            "data.path",
            "not read: data.format is planted",
            tree.origin("data.path"),
            "with=data/demo",
        )


def vocabulary(model: ModelSpec, tree: Tree) -> Found:
    """The built-in tokenizer has 256 bytes and three marks."""
    if model.tokenizer == "bytes" and model.architecture.vocab_size < BYTE_VOCABULARY:
        what = f"{model.architecture.vocab_size} is below the byte tokenizer's {BYTE_VOCABULARY}"
        yield Problem(
            "model.architecture.vocab_size", what, tree.origin("model.architecture.vocab_size")
        )


def batch(batch: Batch, parallel: Parallel, world: int, needs: Needs, tree: Tree) -> Found:
    """prompts x responses = k minibatches; minibatch = data x micro_batch x slots; with VPP, slots
    = k pipeline."""
    rows = batch.prompts * batch.responses
    if needs.rollout and rows % batch.minibatch:
        what = (
            f"prompts {batch.prompts} × responses {batch.responses} = {rows} sequences do not"
            f" divide by minibatch {batch.minibatch}"
        )
        yield Problem("batch.minibatch", what, tree.origin("batch.minibatch"), _divisors(rows))
    if world % parallel.model:
        return
    replicas = world // parallel.model
    if batch.minibatch % (replicas * batch.micro_batch):
        yield Problem(
            "batch.minibatch",
            f"{batch.minibatch} does not divide by data {replicas} × micro_batch"
            f" {batch.micro_batch} = {replicas * batch.micro_batch} (data {replicas} = world"
            f" {world} / (tensor {parallel.tensor} × pipeline {parallel.pipeline}))",
            tree.origin("batch.minibatch"),
            _fitting(batch, parallel, replicas, needs.rollout),
        )
        return
    slots = batch.minibatch // (replicas * batch.micro_batch)
    if parallel.virtual_pipeline > 1 and slots % parallel.pipeline:
        what = (
            f"minibatch {batch.minibatch} / (data {replicas} × micro_batch {batch.micro_batch}) ="
            f" {slots} micro-batches do not divide by pipeline {parallel.pipeline}, as"
            f" virtual_pipeline {parallel.virtual_pipeline} needs"
        )
        yield Problem(
            "batch.micro_batch",
            what,
            tree.origin("batch.micro_batch"),
            _fitting(batch, parallel, replicas, needs.rollout),
        )


def responses(batch: Batch, algorithm: dict[str, Any], tree: Tree) -> Found:
    """A component that compares the responses to one prompt needs several of them."""
    for slot, block in algorithm.items():
        if not isinstance(block, dict) or "name" not in block:
            continue
        least = getattr(registry.lookup(slot, block["name"]), "min_responses", 1)
        if batch.responses < least:
            yield Problem(
                "batch.responses",
                f"{slot} {block['name']} needs at least {least} responses to a prompt, not"
                f" {batch.responses}",
                tree.origin("batch.responses"),
                f"batch.responses={least}",
            )


def _fitting(batch: Batch, parallel: Parallel, replicas: int, rollout: bool) -> str:
    """The largest micro_batch that divides; else the next larger minibatch, and the prompts that
    fill it."""
    group = replicas * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    for size in range(batch.micro_batch - 1, 0, -1):
        if batch.minibatch % (group * size) == 0:
            return f"batch.micro_batch={size}"
    unit = group * batch.micro_batch
    minibatch = -(-batch.minibatch // unit) * unit
    words = f"batch.minibatch={minibatch}"
    if rollout and batch.prompts * batch.responses % minibatch:
        share = minibatch // math.gcd(minibatch, batch.responses)
        words += f" batch.prompts={-(-batch.prompts // share) * share}"
    return words


def precision(precision: Precision, hardware: Hardware, tree: Tree) -> Found:
    if precision.fp8 != "none" and precision.dtype != "bf16":
        where = tree.origin("precision.fp8")
        yield Problem(
            "precision.fp8",
            f"{precision.fp8} needs precision.dtype bf16, not {precision.dtype}",
            where,
            "precision.dtype=bf16",
        )
    if precision.fp8 != "none" and not hardware.gpus:
        where = tree.origin("precision.fp8")
        yield Problem(
            "precision.fp8",
            "needs GPUs, and this recipe is for a CPU (hardware.gpus 0)",
            where,
            "with=hardware/h100x8_fp8",
        )


def unread(needs: Needs, algorithm: dict[str, Any], tree: Tree) -> Found:
    """Keys that only a rollout reads."""
    if needs.rollout:
        return
    for key in ROLLOUT_KEYS:
        if tree.written(key):
            yield Problem(
                key,
                f"algorithm {algorithm['name']!r} does not read it",
                tree.origin(key),
                "remove it",
            )


def run(run: Run, tree: Tree) -> Found:
    if not run.dir:
        yield Problem("run.dir", "is empty", tree.origin("run.dir"), "run.dir=runs/my_run")
    if run.stop.score_patience is not None and not run.eval_every:
        what = "counts evaluations, and run.eval_every is 0"
        yield Problem(
            "run.stop.score_patience",
            what,
            tree.origin("run.stop.score_patience"),
            "set run.eval_every",
        )


# ----------------------------------------------------------------------------------------- warnings


def unused_models(models: dict[str, ModelConfig], needs: Needs, tree: Tree) -> Found:
    for role in models:
        if is_role(role) and role not in (*needs.roles, *needs.optional):
            yield Problem(
                f"models.{role}",
                "not loaded: nothing in this recipe asks for it",
                tree.origin(f"models.{role}"),
            )


def truncated_sampling(algorithm: dict[str, Any], tree: Tree) -> Found:
    """Training log-probs are of softmax(logits / T), so what is sampled must be, too (algorithm.md
    5.7)."""
    if "rollout" not in algorithm or algorithm["rollout"]["name"] != "sampling":
        return
    off = {"top_p": 1.0, "top_k": 0}
    for key, neutral in off.items():
        if algorithm["rollout"][key] != neutral:
            what = (
                f"{algorithm['rollout'][key]} in training: old log-probs are then of another"
                " distribution than the one sampled from"
            )
            yield Problem(
                f"algorithm.rollout.{key}",
                what,
                tree.origin(f"algorithm.rollout.{key}"),
                f"{neutral}; evaluation has its own {key}",
            )


def loads(models: dict[str, ModelConfig], run: Run, needs: Needs, tree: Tree) -> Found:
    """Weights that are not on this machine. A recipe may be checked elsewhere; the launcher
    refuses."""
    absent: dict[str, list[str]] = {}
    for role in needs.roles:
        if role in models and not _present(models[role].load, run):
            absent.setdefault(models[role].load, []).append(role)
    for load, roles in absent.items():
        key = f"models.{roles[0]}.load"
        also = f" (asked for by {', '.join(roles)})" if len(roles) > 1 else ""
        yield Problem(
            key,
            f"{load!r} is not on this machine{also}",
            tree.origin(key),
            "train the stage before it, or give another path",
        )


def _present(load: str, run: Run) -> bool:
    """Anything but `random` and what may be a hub name must exist."""
    return load == "random" or may_be_hub(load, run.dir) or Path(load).exists()


def may_be_hub(load: str, run_dir: str) -> bool:
    """`owner/model`, unless it lies where this project's runs lie."""
    return (
        re.fullmatch(r"[\w-]+/[\w.-]+", load) is not None
        and Path(load).parts[:1] != Path(run_dir).parts[:1]
    )


def missing_loads(recipe: Recipe) -> list[Problem]:
    """What a launcher must refuse to start without."""
    needs = Needs(frozenset(), tuple(recipe.models), recipe.trained)
    return list(loads(recipe.models, recipe.run, needs, Tree(recipe.tree)))


def group_prices(algorithm: dict[str, Any], tree: Tree) -> Found:
    """A component that uses groups, and none to use."""
    if "group_classifier" not in algorithm or algorithm["group_classifier"]["name"] != "none":
        return
    for slot, names in (
        ("variance_regulariser", ("group_variance", "group_dro")),
        ("kl_controller", ("group_adaptive",)),
    ):
        if algorithm[slot]["name"] in names:
            key = f"algorithm.{slot}.name"
            what = (
                f"{algorithm[slot]['name']} has no effect: group_classifier is none, all sequences"
                " are one group"
            )
            yield Problem(
                key, what, tree.origin(key), "algorithm.group_classifier.name=critic_head"
            )


BYTE_VOCABULARY = 259
PROBLEMS: tuple[Callable[..., Found], ...] = (
    roles,
    layout,
    architecture,
    lengths,
    planted,
    vocabulary,
    batch,
    responses,
    precision,
    unread,
    run,
)
WARNINGS: tuple[Callable[..., Found], ...] = (
    unused_models,
    truncated_sampling,
    loads,
    group_prices,
)
