"""Reading checkpoints: a whole run's state, or weights alone, at any layout."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from gipo_megatron.errors import UserError, library_errors
from gipo_megatron.megatron.checkpoint.digests import check_digests
from gipo_megatron.megatron.checkpoint.finite import check_finite
from gipo_megatron.megatron.checkpoint.sharded import metadata, sharded_chunks, whole_chunks
from gipo_megatron.megatron.checkpoint.writing import describe
from gipo_megatron.megatron.cpu_compat import host_mode
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.scaling import without_extra_states
from gipo_megatron.megatron.stored import load, read_state
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.checkpoints import (
    OTHER,
    CheckpointMeta,
    RoleMeta,
    read_hf_files,
    read_meta,
)

_GROUP_WEIGHTS = ("group_head.weight", "group_head.bias")
# The saved roles that a role may start from, the best first. A trunk from another kind of model
# comes without its head.
_SOURCES = {
    "actor": ("actor",),
    "reference": ("actor",),
    "reward": ("reward", "actor"),
    "critic": ("critic", "reward", "actor"),
    "gold": ("reward",),  # a judge with a head that never learnt would be noise
}


def restore(path: Path, roles: dict[str, Engine], mesh: Mesh) -> dict[str, Any]:
    """Load all that `save` wrote back into `roles`, at any parallel split; return the caller's
    state. Collective.

    Raises UserError when a role is missing, its model is another one, or a file cannot be read.
    """
    meta = read_meta(path)
    for role, engine in roles.items():
        if role not in meta.roles:
            raise UserError(
                f"the checkpoint has no {role!r}; it has {', '.join(meta.roles)}", where=str(path)
            )
        _check_role(path, role, meta.roles[role], describe(engine))
    with _unreadable(path):
        check_digests(path, meta, mesh)
    for role, engine in roles.items():
        with _unreadable(path):
            _restore_role(path / role, engine)
        engine.hf_files = read_hf_files(path / "huggingface" / role)
    mesh.barrier()
    return read_state(path)


def _unreadable(path: Path) -> AbstractContextManager[None]:
    """Return a context in which any error is one of this checkpoint's files: of the right size, but
    with other content, or without a tensor."""
    return library_errors("cannot read the checkpoint", where=str(path), fix=OTHER)


def _check_role(path: Path, role: str, saved: RoleMeta, mine: RoleMeta) -> None:
    check_architecture(path, saved.architecture, mine.architecture)
    _check_adapter(path, saved, mine)
    if saved.adapter is None and mine.adapter is not None:
        raise UserError(
            f"{role!r} was saved as a whole model, and this run trains adapters",
            where=str(path),
            fix=f"start a new run.dir with models.{role}.load={path}",
        )
    if (mine.head, mine.trained) != (saved.head, saved.trained):
        raise UserError(
            f"{role!r} was saved with another head or without its optimizer",
            where=str(path),
            fix="load its weights instead",
        )
    if mine.num_groups != saved.num_groups:
        raise UserError(
            f"{role!r} was saved with {saved.num_groups} groups, this run has {mine.num_groups}",
            where=str(path),
            fix="resume with the same group_classifier, or start a new run.dir",
        )


def _restore_role(folder: Path, engine: Engine) -> None:
    with (
        engine.residency.use(training=engine.optimisation is not None),
        host_mode(),
        torch.no_grad(),
    ):
        chunks = sharded_chunks(engine)
        sharded = without_extra_states(chunks)
        wanted = {**sharded, "scaling": engine.scaling.to_load(list(chunks.values()), folder)}
        if engine.optimisation is not None:
            wanted["optimizer"] = engine.optimizer.sharded_state_dict(
                sharded, is_loading=True, metadata=metadata()
            )
        if engine.group_head is not None:
            wanted["group_head"] = engine.group_head.sharded_state()
        loaded = load(wanted, folder)
        _fill(engine, sharded, loaded)
        engine.version += 1
        if engine.optimisation is not None:
            engine.optimizer.load_state_dict(loaded["optimizer"])
            engine.learning_rate.load_state_dict(loaded["learning_rate"])
        if engine.group_head is not None and engine.mesh.is_last_stage:
            engine.group_head.load_sharded_state(loaded["group_head"])
        check_finite(engine, folder, OTHER)


def _fill(engine: Engine, sharded: dict[str, dict[str, Any]], loaded: dict[str, Any]) -> None:
    """Copy the weights of `sharded`, and FP8 scaling state; all else stays as it is."""
    for (name, wanted), chunk in zip(sharded.items(), engine.chunks, strict=True):
        missing = chunk.load_state_dict(loaded.get(name, {}), strict=False).missing_keys
        assert not wanted.keys() & set(missing), f"not loaded: {wanted.keys() & set(missing)}"
    engine.scaling.write(loaded.get("scaling", {}))  # version 1 has none


def load_weights(path: Path, role: str, engine: Engine) -> str:
    """Load weights only, into a model of `role`; return the saved role they came from. Collective.

    A reward model's score head becomes a critic's value head; from an actor only the trunk is
    taken. A saved group head is taken when it has this one's shape. Of a model with adapters only
    these and a head are saved; `build.load_into` has loaded their base. Raises UserError when no
    saved role fits, or the architecture or the adapters are others.
    """
    source, meta = source_of(path, role)
    saved = meta.roles[source]
    check_architecture(path, saved.architecture, engine.architecture)
    _check_adapter(path, saved, describe(engine))
    same_head = (saved.head is None) == (engine.head is None)
    same_groups = engine.group is not None and saved.num_groups == engine.group.num_groups
    with (
        _unreadable(path),
        engine.residency.use(training=engine.optimisation is not None),
        host_mode(),
        torch.no_grad(),
    ):
        check_digests(path, meta, engine.mesh, unread=meta.roles.keys() - {source})
        chunks = whole_chunks(engine) if saved.adapter is None else sharded_chunks(engine)
        sharded = without_extra_states(chunks)
        if not same_head:
            for part in sharded.values():
                for key in [k for k in part if k.startswith("output_layer.")]:
                    del part[key]
        head = engine.group_head if same_groups else None
        group = {} if head is None else head.sharded_state()
        group = {key: part for key, part in group.items() if key in _GROUP_WEIGHTS}
        scaling = engine.scaling.to_load(list(chunks.values()), path / source)
        loaded = load({**sharded, **group, "scaling": scaling}, path / source)
        _fill(engine, sharded, loaded)
        if head is not None:
            own = {f"group_head.{key}": value for key, value in head.state_dict().items()}
            head.load_sharded_state(own | {key: loaded[key] for key in group})
        engine.weights_changed()
        check_finite(engine, path, OTHER)
    engine.hf_files = read_hf_files(path / "huggingface" / source)
    return source


def source_of(path: Path, role: str) -> tuple[str, CheckpointMeta]:
    """Return the saved role that `role` starts from, and all of meta.json. Raises UserError when
    none fits."""
    meta = read_meta(path)
    for source in _SOURCES[role]:
        if source in meta.roles:
            return source, meta
    wanted = " or ".join(repr(source) for source in _SOURCES[role])
    raise UserError(
        f"no weights for {role!r}: needs {wanted}, the checkpoint has {', '.join(meta.roles)}",
        where=str(path),
    )


def _check_adapter(path: Path, saved: RoleMeta, mine: RoleMeta) -> None:
    """Raise UserError where saved adapters are not those of this model."""
    if saved.adapter is None:
        return
    for what, there, here in (
        ("other adapters", saved.adapter, mine.adapter),
        ("adapters on another base", saved.base, mine.base),
    ):
        if there != here:
            raise UserError(
                f"the checkpoint has {what}: there {there}, here {here}",
                where=str(path),
                fix=(
                    "give the same model.adapter, on the same base model, or load the merged model"
                    " (gipo convert to-hf merge=true)"
                ),
            )


def check_architecture(path: Path, saved: Architecture, mine: Architecture) -> None:
    """Raise UserError that lists every number in which saved weights and the model that is built
    differ."""
    different = [
        f"{f.name}: there {getattr(saved, f.name)}, here {getattr(mine, f.name)}"
        for f in fields(mine)
        if getattr(saved, f.name) != getattr(mine, f.name)
    ]
    if different:
        raise UserError(
            f"the weights are of another architecture: {'; '.join(different)}",
            where=str(path),
            fix="leave model.architecture out of the recipe: it is read from the weights",
        )
