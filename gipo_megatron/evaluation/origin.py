"""Origin of the responses: weights, tokenizer, and the record of both in run.dir."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from gipo_megatron import registry
from gipo_megatron.data.tokenizer import Tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.recipe import EvaluationRecipe
from gipo_megatron.files import read_object, write_json
from gipo_megatron.recipe.source import Block, parse_yaml
from gipo_megatron.specs import base_role
from gipo_megatron.weights.checkpoints import read_meta, weights_kind
from gipo_megatron.weights.sources import (
    check_tokenizer,
    find_tokenizer,
    locate,
    stored_fingerprint,
    tokenizer_difference,
)


def find_weights(recipe: EvaluationRecipe) -> dict[str, Path]:
    """Return {recipe key: folder} of every model.

    Raises UserError for a folder without a model, or a damaged checkpoint.
    """
    found = {}
    for section, group in (("policies", recipe.policies), ("models", recipe.models)):
        for name, weights in group.items():
            key = f"{section}.{name}.load"
            found[key] = locate(weights.load, key)
            if weights_kind(found[key]) == "checkpoint":
                read_meta(found[key])  # every file exists and has its size
    return found


def not_independent(recipe: EvaluationRecipe) -> list[str]:
    """Return a warning for each policy whose recipe shows that it was trained against the reward
    model that judges: such a policy may have learnt to please it."""
    if "reward" not in getattr(registry.lookup("judge", recipe.judge["name"]), "needs", ()):
        return []
    judge = recipe.models["reward"].load
    return [
        f"{name} was trained against the reward model that judges ({judge}); judge with one that"
        " was trained on other pairs"
        for name, weights in recipe.policies.items()
        if any(
            load == judge or _run_of(place) == _run_of(Path(judge))
            for load, place in _teachers(Path(weights.load))
        )
    ]


def _teachers(policy: Path) -> Iterator[tuple[str, Path]]:
    """Yield the reward models of a policy's run: as its recipe names them, and their places."""
    run = _run_of(policy)
    marked = ((policy, "meta.json"), (run, "metrics.jsonl"))  # by this project alone
    records = [folder / "recipe.yaml" for folder, mark in marked if (folder / mark).is_file()]
    found = [record for record in records if record.is_file()]  # a converted model has none
    if not found:
        return
    record = parse_yaml(found[0].read_text(encoding="utf-8"), str(found[0]))
    # a recipe's paths begin where the run was started
    own = Path(os.path.expanduser(str(record.value("run.dir")))).parts
    inside = own and run.parts[-len(own) :] == own
    start = Path(*run.parts[: -len(own)]) if inside else Path()
    models = record.at("models")
    for role in models.children if isinstance(models, Block) else ():
        if base_role(role) == "reward":
            load = str(record.value(f"models.{role}.load"))
            yield load, start / os.path.expanduser(load)


def _run_of(weights: Path) -> Path:
    """Return the run folder of a checkpoint (RUN/final, RUN/checkpoints/step_N) or an export
    (RUN/hf); other weights are a folder of their own."""
    home = weights.resolve()
    folders = (home, *home.parents[:2])
    return next((folder for folder in folders if (folder / "metrics.jsonl").is_file()), home)


def shared_tokenizer(
    recipe: EvaluationRecipe, weights: Mapping[str, Path]
) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer of all models, and warnings.

    Raises UserError naming two policies with different tokenizers: equal ids would be different
    text.
    """
    keys = [f"policies.{name}.load" for name in recipe.policies]
    tokenizer = find_tokenizer(recipe.model.tokenizer, {keys[0]: str(weights[keys[0]])})
    stored = {key: stored_fingerprint(weights[key], tokenizer) for key in keys}
    recorded = [key for key in keys if stored[key] is not None]
    for key in recorded:
        first = recorded[0]
        if stored[key] != stored[first]:
            raise UserError(
                f"two policies with different tokenizers: {first.split('.')[1]} ({weights[first]})"
                f" and {key.split('.')[1]} ({weights[key]})"
                + tokenizer_difference(weights[first], weights[key]),
                where=key,
                fix="evaluate the policies of each tokenizer in a separate evaluation",
            )
    notes: list[str] = []
    for key, folder in weights.items():
        for template in dict.fromkeys(task.template for task in recipe.tasks):
            notes += check_tokenizer(folder, tokenizer, template, key)
    return tokenizer, notes


def origin(
    recipe: EvaluationRecipe, weights: Mapping[str, Path], tokenizer: Tokenizer
) -> dict[str, str]:
    """Return what a stored response depends on besides its prompt, a line for each key.

    Weights are identified by their files' sizes and times.
    """
    generation = asdict(recipe.generation)
    return {
        **{f"generation.{key}": str(v) for key, v in generation.items() if key != "batch"},
        "rollout.name": recipe.rollout["name"],
        "model.tokenizer": tokenizer.fingerprint,
        **{key: _state_of(folder) for key, folder in weights.items()},
    }


def _state_of(folder: Path) -> str:
    home = folder.resolve()
    files = sorted(path for path in home.rglob("*") if path.is_file())
    facts = [(str(p.relative_to(home)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f"{folder} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def check_origin(directory: Path, mine: Mapping[str, str]) -> None:
    """Record in origin.json where this folder's responses come from. Rank 0 only.

    Policies may be added or removed; everything else must stay as for the first response. Raises
    UserError if the responses in the folder have another origin.
    """
    file = directory / "origin.json"
    before = read_object(file, "remove this run.dir") if file.is_file() else {}
    responses = any((directory / "responses").glob("*.jsonl"))
    if not responses and not (directory / "verdicts.jsonl").is_file():
        before = {}  # stopped before the first response
    changed = [
        key
        for key in dict.fromkeys((*before, *mine))
        if before
        and before.get(key) != mine.get(key)
        and (not key.startswith("policies.") or (key in before and key in mine))
    ]
    if changed:
        lines = "; ".join(
            f"{key}: {before.get(key, 'none')} there, {mine.get(key, 'none')} now"
            for key in changed
        )
        raise UserError(
            f"{directory} holds responses of another origin: {lines}",
            where="run.dir",
            fix="choose another run.dir, or remove this one to draw everything again",
        )
    write_json(file, {**before, **mine})
