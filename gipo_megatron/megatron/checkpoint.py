"""Checkpoints: one folder per step, complete or not there, loadable at another tensor × pipeline ×
data split.

DIR/step_12/meta.json      what is inside: step, per role its architecture and head, and the size of
every file
            state.pt       the caller's own state (generators, data position, running moments, …)
            actor/ …       mcore dist_checkpointing: weights, optimizer, learning rate, group head,
            FP8 scaling state
            huggingface/   per role, config.json and generation_config.json of the model it came
            from, word for word
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.scaling import EXTRA_STATE, without_extra_states
from gipo_megatron.megatron.schedules import quiet
from gipo_megatron.specs import Architecture

FORMAT, VERSION = "gipo_megatron", 2  # 2: FP8 scaling state as tensors; all else as in 1
_STEP = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"step_\d+(\.tmp|\.old)?")
HF_FILES = ("config.json", "generation_config.json")
_GROUP_WEIGHTS = ("group_head.weight", "group_head.bias")
# Whose weights a role may start from, the best first. A trunk from another kind of model comes
# without its head.
_SOURCES = {
    "actor": ("actor",),
    "reference": ("actor",),
    "reward": ("reward", "actor"),
    "critic": ("critic", "reward", "actor"),
}


class _InlineSave(TorchDistSaveShardedStrategy):
    """mcore's torch_dist format, written by this process: mcore's own writer starts a manager and
    forks, seconds per save."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        grouped, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(grouped, False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False,
                flatten_state_dict=False,
                can_run_decentralized_global_plan=False,
            ),
        )


def _metadata() -> dict[str, Any]:
    """A fresh one for every call: mcore puts the data parallel group of the moment into it.

    mem_efficient: a replica group's optimizer is gathered in host memory (gloo) on its first rank,
    which writes it. Else every rank gathers all of it on its GPU: 4 bytes a parameter and as much
    again to receive, beside a model that fills the card.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


# ------------------------------------------------------------------------------------------ writing


def save(
    directory: Path,
    step: int,
    roles: dict[str, Engine],
    mesh: Mesh,
    state: dict[str, Any],
    meta: dict[str, Any],
    extra_files: Callable[[Path], None] | None = None,
    keep: int | None = None,
) -> Path:
    """Write DIR/step_N and return it. It appears whole, by one rename. Collective; `state`, `meta`
    and `extra_files(folder)` are rank 0's.

    keep: the newest so many step folders stay, and those that a link in DIR or beside it points to.
    """
    final = directory / f"step_{step}"
    write(final, roles, mesh, state, {"step": step, **meta}, extra_files)
    if mesh.is_main and keep is not None:
        _prune(directory, keep)
    mesh.barrier()
    return final


def write(
    final: Path,
    roles: dict[str, Engine],
    mesh: Mesh,
    state: dict[str, Any],
    meta: dict[str, Any],
    extra_files: Callable[[Path], None] | None = None,
) -> None:
    """One checkpoint as the folder `final`, which appears whole, by one rename. Collective. Raises
    UserError for a full disk."""
    work, old = final.with_name(final.name + ".tmp"), final.with_name(final.name + ".old")
    try:
        if mesh.is_main:
            shutil.rmtree(work, ignore_errors=True)
            for role, engine in roles.items():
                (work / role).mkdir(parents=True)
                _write_hf_files(work / "huggingface" / role, engine.hf_files)
            work.mkdir(parents=True, exist_ok=True)
        mesh.barrier()
        for role, engine in roles.items():
            _save_role(work / role, engine)
        if mesh.is_main:
            torch.save(state, work / "state.pt")
            if extra_files is not None:
                extra_files(work)
            files = {
                str(p.relative_to(work)): p.stat().st_size
                for p in sorted(work.rglob("*"))
                if p.is_file()
            }
            about = {role: describe(engine) for role, engine in roles.items()}
            described = {
                "format": FORMAT,
                "version": VERSION,
                "roles": about,
                "files": files,
                **meta,
            }
            (work / "meta.json").write_text(json.dumps(described, indent=1))
            if final.exists():
                final.rename(old)
            work.rename(final)
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, torch_checkpoint.CheckpointException) as error:
        reason = _full_disk(error)
        if reason is None:
            raise
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint: {reason}",
            where=str(final),
            fix="make room, then start again",
        ) from None


def _write_hf_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def read_hf_files(folder: Path) -> dict[str, str]:
    """config.json and generation_config.json of a folder, as far as they are there."""
    return {
        name: (folder / name).read_text(encoding="utf-8")
        for name in HF_FILES
        if (folder / name).is_file()
    }


def _full_disk(error: BaseException) -> str | None:
    """The system's words, when a write failed; torch wraps what its writer met, on any rank, in
    exceptions of its own."""
    found: list[BaseException] = [
        error,
        *(e for e in (error.__cause__, error.__context__) if e is not None),
    ]
    if isinstance(error, torch_checkpoint.CheckpointException):
        found += [wrapped[0] for wrapped in error.failures.values()]
    for one in found:
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
        # torch.save onto a full disk
        if "PytorchStreamWriter failed" in str(one) or "unexpected pos" in str(one):
            return "no space left, or a file size limit"
    return None


def _save_role(folder: Path, engine: Engine) -> None:
    with engine.residency.use(training=engine.optimisation is not None), quiet(), torch.no_grad():
        torch.cuda.empty_cache()  # NCCL and gloo allocate past torch's cache
        chunks = _sharded_chunks(engine)
        sharded = without_extra_states(chunks)
        common: dict[str, Any] = {"scaling": engine.scaling.to_save(list(chunks.values()))}
        if engine.optimisation is not None:
            optimizer = engine.optimizer.sharded_state_dict(
                sharded, is_loading=False, metadata=_metadata()
            )
            # not the first replica; mcore compares what ranks have, and would warn
            if optimizer["param_state"] is None:
                del optimizer["param_state"]
            common["optimizer"] = optimizer
            common["learning_rate"] = engine.learning_rate.state_dict()
        if engine.group_head is not None:
            common["group_head"] = engine.group_head.sharded_state()
        dist_checkpointing.save(
            {**sharded, **common}, str(folder), sharded_strategy=_InlineSave("torch_dist", 1)
        )


def _sharded_chunks(engine: Engine) -> dict[str, dict[str, Any]]:
    """Name in the checkpoint -> the chunk's sharded state dict, as mcore makes it."""
    names = (
        ["model"] if len(engine.chunks) == 1 else [f"model{i}" for i in range(len(engine.chunks))]
    )
    return {
        name: chunk.sharded_state_dict(metadata=_metadata())
        for name, chunk in zip(names, engine.chunks, strict=True)
    }


def describe(engine: Engine) -> dict[str, Any]:
    """What meta.json says of a role."""
    return {
        "architecture": asdict(engine.architecture),
        "head": engine.head,
        "dtype": engine.precision.dtype,
        "num_groups": engine.group.num_groups if engine.group is not None else None,
        "group_input": engine.group.input if engine.group is not None else None,
        "trained": engine.optimisation is not None,
    }


def _prune(directory: Path, keep: int) -> None:
    linked = {
        p.resolve()
        for folder in (directory, directory.parent)
        for p in folder.iterdir()
        if p.is_symlink()
    }
    for _, path in _steps(directory)[: -keep or None]:
        if path.resolve() not in linked:
            _remove(path)


def _remove(path: Path) -> None:
    """meta.json first: what a kill leaves half-removed is no checkpoint."""
    (path / "meta.json").unlink(missing_ok=True)
    shutil.rmtree(path)


def discard_after(directory: Path, step: int) -> None:
    """A run that continues after `step` has no later checkpoints, and nothing half-written or
    half-removed. Rank 0 only."""
    if not directory.is_dir():
        return
    keep = {path for number, path in _steps(directory) if number <= step}
    for path in directory.iterdir():
        if path not in keep and path.is_dir() and _LEFTOVER.fullmatch(path.name):
            _remove(path)


def link(name: Path, target: Path) -> None:
    """`name` becomes a relative symlink to `target`, replacing an older link in one step. Rank 0
    only."""
    fresh = name.with_name(name.name + ".tmp")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, name.parent))
    os.replace(fresh, name)


# ------------------------------------------------------------------------------------------ finding


def _steps(directory: Path) -> list[tuple[int, Path]]:
    """Complete step folders, oldest first."""
    if not directory.is_dir():
        return []
    found = [
        (int(m.group(1)), p)
        for p in directory.iterdir()
        if (m := _STEP.fullmatch(p.name)) and (p / "meta.json").is_file()
    ]
    return sorted(found)


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint in DIR, or None."""
    steps = _steps(directory)
    return steps[-1][1] if steps else None


def kind(path: Path) -> str:
    """ "checkpoint" (of this project) or "huggingface", told by content. Raises UserError naming
    what was found."""
    if not path.exists():
        raise UserError(
            f"nothing to load at {path}",
            fix="give a Hugging Face folder, a checkpoint of this project, or `random`",
        )
    found = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if "meta.json" in found and _read_meta(path).get("format") == FORMAT:
        return "checkpoint"
    if "config.json" in found and any(n.endswith(".safetensors") for n in found):
        return "huggingface"
    if "config.json" in found and any(n.endswith(".bin") for n in found):
        raise UserError(
            "a Hugging Face folder without safetensors",
            where=str(path),
            fix="save it again with safe_serialization=True",
        )
    shown = ", ".join(found[:8]) + (" …" if len(found) > 8 else "") if path.is_dir() else "a file"
    steps = f"; its newest checkpoint is {latest(path)}" if latest(path) else ""
    raise UserError(
        "neither a checkpoint (meta.json) nor a Hugging Face folder (config.json + *.safetensors);"
        f" found: {shown or 'nothing'}{steps}",
        where=str(path),
        fix="give the folder of one checkpoint, or of one Hugging Face model",
    )


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"unreadable meta.json: {error}",
            where=str(path / "meta.json"),
            fix="use another checkpoint",
        ) from None


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's meta.json. Raises UserError when `path` is no checkpoint, or one of a newer
    version."""
    if kind(path) != "checkpoint":
        raise UserError(
            f"{path} is a Hugging Face folder, not a checkpoint of this project", where=str(path)
        )
    meta = _read_meta(path)
    if meta["version"] > VERSION:
        raise UserError(
            f"checkpoint version {meta['version']} is newer than this program's {VERSION}",
            where=str(path),
            fix="update the program",
        )
    _check_files(path, meta)
    return meta


def _check_files(path: Path, meta: dict[str, Any]) -> None:
    """Every file is there with the size it was written with; what mcore says of a torn file names
    neither."""
    if "files" not in meta:
        raise UserError(
            "meta.json does not list the checkpoint's files",
            where=str(path),
            fix="use another checkpoint",
        )
    for name, size in meta["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, {size} were written"
            raise UserError(
                f"damaged checkpoint: {name} {state}",
                where=str(path),
                fix=(
                    "copy it again, or use another; a run resumes from the checkpoint before when"
                    " this folder is removed"
                ),
            )


# ------------------------------------------------------------------------------------------ reading


def restore(path: Path, roles: dict[str, Engine], mesh: Mesh) -> dict[str, Any]:
    """Everything `save` wrote, back into `roles`, at any parallel split; returns the caller's
    state. Collective.

    Raises UserError when a role is missing or its model is another one.
    """
    meta = read_meta(path)
    for role, engine in roles.items():
        if role not in meta["roles"]:
            raise UserError(
                f"the checkpoint has no {role!r}; it has {', '.join(meta['roles'])}",
                where=str(path),
            )
        check_architecture(path, meta["roles"][role]["architecture"], engine.architecture)
        if (engine.head, engine.optimisation is not None) != (
            meta["roles"][role]["head"],
            meta["roles"][role]["trained"],
        ):
            raise UserError(
                f"{role!r} was saved with another head or without its optimizer",
                where=str(path),
                fix="load its weights instead",
            )
        groups = engine.group.num_groups if engine.group is not None else None
        if groups != meta["roles"][role]["num_groups"]:
            raise UserError(
                f"{role!r} was saved with {meta['roles'][role]['num_groups']} groups, this run has"
                f" {groups}",
                where=str(path),
                fix="resume with the same group_classifier, or start a new run.dir",
            )
    for role, engine in roles.items():
        _restore_role(path / role, engine)
        engine.hf_files = read_hf_files(path / "huggingface" / role)
    mesh.barrier()
    # dicts, numbers, strings, tensors: no code can hide in it
    return torch.load(path / "state.pt", weights_only=True, map_location="cpu")


def _restore_role(folder: Path, engine: Engine) -> None:
    with engine.residency.use(training=engine.optimisation is not None), quiet(), torch.no_grad():
        chunks = _sharded_chunks(engine)
        sharded = without_extra_states(chunks)
        wanted = {**sharded, "scaling": engine.scaling.to_load(list(chunks.values()), folder)}
        if engine.optimisation is not None:
            wanted["optimizer"] = engine.optimizer.sharded_state_dict(
                sharded, is_loading=True, metadata=_metadata()
            )
        if engine.group_head is not None:
            wanted["group_head"] = engine.group_head.sharded_state()
        loaded = dist_checkpointing.load(wanted, str(folder))
        _fill(engine, list(sharded), loaded)
        if engine.optimisation is not None:
            engine.optimizer.load_state_dict(loaded["optimizer"])
            engine.learning_rate.load_state_dict(loaded["learning_rate"])
        if engine.group_head is not None and engine.mesh.is_last_stage:
            engine.group_head.load_sharded_state(loaded["group_head"])


def _fill(
    engine: Engine, names: list[str], loaded: dict[str, Any], without: tuple[str, ...] = ()
) -> None:
    """Weights and FP8 scaling state; keys that begin with `without` stay as they are."""
    for name, chunk in zip(names, engine.chunks, strict=True):
        missing = chunk.load_state_dict(loaded[name], strict=False).missing_keys
        unexpected = [
            key for key in missing if not key.endswith(EXTRA_STATE) and not key.startswith(without)
        ]
        assert not unexpected, f"not loaded: {unexpected}"
    engine.scaling.write(loaded.get("scaling", {}))  # version 1 has none


def load_weights(path: Path, role: str, engine: Engine) -> str:
    """Weights only, into a model of `role`; returns the saved role they came from. Collective.

    A reward model's score head becomes a critic's value head; from an actor only the trunk is
    taken. A saved group head is
    taken when it has this one's shape.  Raises UserError when no saved role fits or the
    architecture is another one.
    """
    meta = read_meta(path)
    source = next((r for r in _SOURCES[role] if r in meta["roles"]), None)
    if source is None:
        wanted = " or ".join(repr(r) for r in _SOURCES[role])
        raise UserError(
            f"no weights for {role!r}: needs {wanted}, the checkpoint has"
            f" {', '.join(meta['roles'])}",
            where=str(path),
        )
    about = meta["roles"][source]
    check_architecture(path, about["architecture"], engine.architecture)
    same_head = (about["head"] is None) == (engine.head is None)
    with engine.residency.use(training=engine.optimisation is not None), quiet(), torch.no_grad():
        chunks = _sharded_chunks(engine)
        sharded = without_extra_states(chunks)
        if not same_head:
            for part in sharded.values():
                for key in [k for k in part if k.startswith("output_layer.")]:
                    del part[key]
        head = (
            engine.group_head
            if engine.group is not None and about["num_groups"] == engine.group.num_groups
            else None
        )
        group = (
            {key: part for key, part in head.sharded_state().items() if key in _GROUP_WEIGHTS}
            if head is not None
            else {}
        )
        scaling = engine.scaling.to_load(list(chunks.values()), path / source)
        loaded = dist_checkpointing.load(
            {**sharded, **group, "scaling": scaling}, str(path / source)
        )
        _fill(engine, list(sharded), loaded, without=() if same_head else ("output_layer.",))
        if head is not None and group:
            head.load_sharded_state(
                {f"group_head.{k}": v for k, v in head.state_dict().items()}
                | {k: loaded[k] for k in group}
            )
        engine.weights_changed()
    engine.hf_files = read_hf_files(path / "huggingface" / source)
    return source


def check_architecture(path: Path, theirs: dict[str, Any], mine: Architecture) -> None:
    """Raises UserError naming every number in which saved weights are of another model than the one
    that is built."""
    different = [
        (f.name, theirs[f.name], getattr(mine, f.name))
        for f in fields(mine)
        if theirs[f.name] != getattr(mine, f.name)
    ]
    if different:
        lines = "; ".join(f"{name}: there {saved}, here {here}" for name, saved, here in different)
        fix = "leave model.architecture out of the recipe: it is read from the weights"
        raise UserError(
            f"the weights are of another architecture: {lines}", where=str(path), fix=fix
        )
