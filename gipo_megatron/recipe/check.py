"""Checks across sections, before any model is built: sizes divide, roles have weights, keys are
read."""

from __future__ import annotations

import math
import re
from pathlib import Path

from gipo_megatron.recipe.adapters import adapters
from gipo_megatron.recipe.draft import Check, Draft, Found
from gipo_megatron.recipe.needs import ROLLOUT_KEYS, is_role
from gipo_megatron.recipe.problems import Problem, suggest
from gipo_megatron.recipe.samplers import served, server
from gipo_megatron.recipe.schema import ROLES, TRAINING_KEYS, Batch, Recipe
from gipo_megatron.recipe.source import Block
from gipo_megatron.specs import Parallel, divisors, split_problems

BYTE_VOCABULARY = 259  # the built-in tokenizer: 256 bytes and three marks


# ---------------------------------------------------------------------------------------- problems


def roles(d: Draft) -> Found:
    """Each model that is needed is there; trained ones have a learning rate, the others none."""
    for role in d.needs.roles:
        if role not in d.models:
            yield d.problem(
                f"models.{role}.load", "missing", f"this algorithm needs a model {role!r}"
            )
    for role, config in d.models.items():
        key = f"models.{role}"
        if not is_role(role):
            yield d.problem(key, "unknown role", suggest(role, [*ROLES, "reward_<name>"]))
        elif role in d.needs.trained:
            if config.lr is None:
                where, fix = d.tree.origin_of(key), f"{key}.lr=1e-6"
                yield Problem(f"{key}.lr", "missing: this algorithm trains it", where, fix)
        elif role in d.needs.roles:
            for name in TRAINING_KEYS:
                if d.tree.written(f"{key}.{name}"):
                    what = "not read: this algorithm does not train it"
                    yield d.problem(f"{key}.{name}", what, "remove it")


def layout(d: Draft) -> Found:
    """tensor × pipeline × data = world"""
    for error in d.parallel.problems(d.world):
        yield d.problem(error.where, error.what, error.fix)


def architecture(d: Draft) -> Found:
    """Heads and the feed-forward width divide by the tensor ranks, layers by pipeline chunks."""
    for error in split_problems(d.model.architecture, d.parallel):
        yield d.problem(error.where, error.what, error.fix)


def lengths(d: Draft) -> Found:
    """Sequences fit into the model, responses into sequences."""
    data, positions = d.data, d.model.architecture.max_positions
    if data.max_length > positions:
        what = f"{data.max_length} exceeds model.architecture.max_positions {positions}"
        yield d.problem("data.max_length", what)
    if data.max_response >= data.max_length:
        room = f"leaves no room for a prompt in data.max_length {data.max_length}"
        yield d.problem("data.max_response", f"{data.max_response} {room}")


def planted(d: Draft) -> Found:
    """Generated data are not read from a file."""
    if d.data.format == "planted" and d.data.path:
        yield d.problem("data.path", "not read: data.format is planted", "with=data/demo")


def vocabulary(d: Draft) -> Found:
    """The model has an embedding for each token of the built-in tokenizer."""
    size = d.model.architecture.vocab_size
    if d.model.tokenizer == "bytes" and size < BYTE_VOCABULARY:
        what = f"{size} is below the byte tokenizer's {BYTE_VOCABULARY}"
        yield d.problem("model.architecture.vocab_size", what)


def micro_batches(d: Draft) -> Found:
    """Rows or tokens limit a micro-batch, and the longest row is within the limit."""
    pair = "pairs" in d.needs.runtime
    yield from limits(d)
    yield from too_few_tokens(
        d,
        d.data.longest_row(pair),
        "a pair of 2 × data.max_length" if pair else "a row of data.max_length",
    )


def limits(d: Draft) -> Found:
    """Either micro_batch or micro_tokens."""
    rows, tokens, key = d.batch.micro_batch, d.batch.micro_tokens, "batch.micro_tokens"
    if rows is None and tokens is None:
        fix = "batch.micro_tokens=8192, or batch.micro_batch=4"
        yield d.problem(key, "missing, and so is batch.micro_batch", fix)
    elif rows is not None and tokens is not None:
        what = f"{tokens}, and batch.micro_batch {rows}: only one of them can be set"
        yield d.problem(key, what, "batch.micro_batch=null, or batch.micro_tokens=null")


def too_few_tokens(d: Draft, longest: int, words: str) -> Found:
    """A token budget has room for the longest row, so that it is the largest micro-batch."""
    tokens = d.batch.micro_tokens
    if tokens is not None and d.batch.micro_batch is None and tokens < longest:
        what = f"{tokens} has no room for {words} = {longest} tokens"
        yield d.problem("batch.micro_tokens", what, f"batch.micro_tokens={longest}")


def batch(d: Draft) -> Found:
    """prompts × responses = k minibatches; minibatch = data × rows; where micro_batch is set, rows
    = micro_batch × slots; with a virtual pipeline, slots = k pipeline."""
    b, p = d.batch, d.parallel
    rows = b.prompts * b.responses
    if d.needs.rollout and rows % b.minibatch:
        product = f"prompts {b.prompts} × responses {b.responses} = {rows}"
        what = f"{product} sequences do not divide by minibatch {b.minibatch}"
        yield d.problem("batch.minibatch", what, divisors(rows))
    if d.world % p.model:
        return
    replicas = d.world // p.model
    size = b.micro_batch or 1
    slots, rest = divmod(b.minibatch, replicas * size)
    fix = _fitting(b, p, replicas, d.needs.rollout)
    if rest:
        unit = f" × micro_batch {size} = {replicas * size}" if b.micro_batch else ""
        yield d.problem(
            "batch.minibatch",
            f"{b.minibatch} does not divide by data {replicas}{unit} (data {replicas} = world"
            f" {d.world} / (tensor {p.tensor} × pipeline {p.pipeline}))",
            fix,
        )
    elif b.micro_batch and p.virtual_pipeline > 1 and slots % p.pipeline:
        yield d.problem(
            "batch.micro_batch",
            f"minibatch {b.minibatch} / (data {replicas} × micro_batch {size}) ="
            f" {slots} micro-batches do not divide by pipeline {p.pipeline}, as virtual_pipeline"
            f" {p.virtual_pipeline} needs",
            fix,
        )


def responses(d: Draft) -> Found:
    """A component that compares the responses to one prompt needs several of them."""
    for key, cls in d.needs.components.items():
        least = getattr(cls, "min_responses", 1)
        if d.batch.responses < least:
            what = f"{d.batch.responses}; {key} needs at least {least} responses to a prompt"
            yield d.problem("batch.responses", what, f"batch.responses={least}")


def _fitting(batch: Batch, parallel: Parallel, replicas: int, rollout: bool) -> str:
    """The largest micro_batch that divides; else the next larger minibatch, and enough prompts."""
    most, rounds = batch.micro_batch or 1, 1
    largest = min(most - 1, 1024)
    if batch.micro_batch and parallel.virtual_pipeline > 1:
        rounds = parallel.pipeline
    group = replicas * rounds
    for size in range(largest, 0, -1):
        if batch.minibatch % (group * size) == 0:
            return f"batch.micro_batch={size}"
    unit = group * most
    minibatch = -(-batch.minibatch // unit) * unit
    words = f"batch.minibatch={minibatch}"
    if rollout and batch.prompts * batch.responses % minibatch:
        share = minibatch // math.gcd(minibatch, batch.responses)
        words += f" batch.prompts={-(-batch.prompts // share) * share}"
    return words


def precision(d: Draft) -> Found:
    """FP8 needs bf16 and GPUs."""
    fp8, dtype, key = d.precision.fp8, d.precision.dtype, "precision.fp8"
    if fp8 == "none":
        return
    if dtype != "bf16":
        what = f"{fp8} needs precision.dtype bf16, not {dtype}"
        yield d.problem(key, what, "precision.dtype=bf16")
    if not d.hardware.gpus:
        what = "needs GPUs, and this recipe is for a CPU (hardware.gpus 0)"
        yield d.problem(key, what, "with=hardware/h100x8_fp8")


def unread(d: Draft) -> Found:
    """Keys that only a rollout reads."""
    for key in () if d.needs.rollout else ROLLOUT_KEYS:
        if d.tree.written(key):
            what = f"algorithm {d.algorithm['name']!r} does not read it"
            yield d.problem(key, what, "remove it")


def run(d: Draft) -> Found:
    """A folder to write to, one length, and evaluations to count."""
    run = d.run
    if not run.dir:
        yield d.problem("run.dir", "is empty", "run.dir=runs/my_run")
    if run.steps is None and run.epochs is None:
        yield d.problem("run.steps", "missing, and so is run.epochs", "run.epochs=1")
    if run.steps is not None and run.epochs is not None:
        what = f"{run.steps}, and run.epochs {run.epochs}: only one of them can be set"
        yield d.problem("run.steps", what, "run.epochs=null, or run.steps=null")
    if run.stop.score_patience is not None and not run.eval_every:
        what = "counts evaluations, and run.eval_every is 0"
        yield d.problem("run.stop.score_patience", what, "set run.eval_every")
    if "gold" in d.needs.roles and not run.eval_every:
        what = "scores held-out responses, and run.eval_every is 0"
        yield d.problem("models.gold.load", what, "set run.eval_every, or models.gold.load=''")


PROBLEMS: tuple[Check, ...] = (
    roles,
    layout,
    architecture,
    lengths,
    planted,
    vocabulary,
    micro_batches,
    batch,
    responses,
    precision,
    adapters,
    server,
    unread,
    run,
)


# ---------------------------------------------------------------------------------------- warnings


def unused_models(d: Draft) -> Found:
    """Models that nothing needs are not loaded."""
    for role in d.models:
        if d.needs.idle(f"models.{role}") and role not in d.needs.optional:
            yield d.problem(f"models.{role}", "not loaded: nothing in this recipe needs it")


def truncated_sampling(d: Draft) -> Found:
    """Training log-probs are of softmax(logits / T), so sampling must be from it (algorithm.md
    5.7)."""
    rollout = d.algorithm.get("rollout", {})
    for key, neutral in (("top_p", 1.0), ("top_k", 0)):
        if (value := rollout.get(key, neutral)) != neutral:
            what = f"{value} in training: old log-probs are of another distribution than samples"
            fix = f"{neutral}; evaluation has its own {key}"
            yield d.problem(f"algorithm.rollout.{key}", what, fix)


def loads(d: Draft) -> Found:
    """Weights that are not on this machine. A recipe may be checked elsewhere; the launcher
    refuses."""
    used = {f"models.{r}.load": d.models[r].load for r in d.needs.roles if r in d.models}
    yield from absent_weights(used, d.run.dir, d.tree)


def absent_weights(loads: dict[str, str], run_dir: str, tree: Block) -> Found:
    """Of {key: load}, the weights that are neither random, nor on this machine, nor hub names."""
    for load in dict.fromkeys(loads.values()):
        if load == "random" or may_be_hub(load, run_dir) or Path(load).exists():
            continue
        keys = [key for key, theirs in loads.items() if theirs == load]
        users = ", ".join(key.split(".")[1] for key in keys)
        what = f"{load!r} is not on this machine"
        what += f" (loaded by {users})" if len(keys) > 1 else ""
        fix = "train the stage before it, or give another path"
        yield Problem(keys[0], what, tree.origin_of(keys[0]), fix)


def may_be_hub(load: str, run_dir: str) -> bool:
    """Return whether `load` is `owner/model`, and not a path beside this project's runs."""
    inside = Path(load).parts[:1] == Path(run_dir).parts[:1]
    return re.fullmatch(r"[\w-]+/[\w.-]+", load) is not None and not inside


def missing_loads(recipe: Recipe) -> list[Problem]:
    """Return the weights without which a launcher must not start."""
    return list(absent_weights(recipe.loads, recipe.run.dir, recipe.tree))


def one_group(d: Draft) -> Found:
    """A component that needs groups beside a classifier that makes one."""
    classes = d.needs.components
    classifier = classes.get("algorithm.group_classifier")
    if getattr(classifier, "makes_groups", True):
        return
    for key, cls in classes.items():
        if getattr(cls, "needs_groups", False):
            name = d.tree.value(f"{key}.name")
            what = f"{name} has no effect: all sequences are one group"
            yield d.problem(f"{key}.name", what, "algorithm.group_classifier.name=critic_head")


WARNINGS: tuple[Check, ...] = (unused_models, truncated_sampling, served, loads, one_group)
