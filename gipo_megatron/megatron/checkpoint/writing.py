"""Writing checkpoints: beside the final name, then one rename."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed import checkpoint as torch_checkpoint

from gipo_megatron.errors import UserError, refusal, system_error
from gipo_megatron.files import to_disk
from gipo_megatron.megatron.checkpoint.digests import digests
from gipo_megatron.megatron.checkpoint.finite import check_finite
from gipo_megatron.megatron.checkpoint.folders import link, prune
from gipo_megatron.megatron.checkpoint.sharded import InlineSave, metadata, sharded_chunks
from gipo_megatron.megatron.cpu_compat import host_mode
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.scaling import without_extra_states
from gipo_megatron.weights.checkpoints import CheckpointMeta, RoleMeta, with_contents

ExtraFiles = Callable[[Path], Any]
_NOT_SAVED = "lower the learning rate; the same command continues from the checkpoint before"


def save(
    directory: Path,
    roles: dict[str, Engine],
    mesh: Mesh,
    meta: CheckpointMeta,
    state: dict[str, Any] | None = None,
    extra_files: ExtraFiles | None = None,
    keep: int | None = None,
    best: Path | None = None,
) -> Path:
    """Write DIR/step_N, N the step of `meta`, and return it. Collective; see `write`.

    best: a link to this folder from now on. keep: only that many of the newest step folders stay,
    and those that a link in DIR or beside it points to.
    """
    final = directory / f"step_{meta.step}"
    write(final, roles, mesh, meta, state, extra_files)
    if mesh.is_main and best is not None:
        link(best, final)
    if mesh.is_main and keep is not None:
        prune(directory, keep)
    mesh.barrier()
    return final


def write(
    final: Path,
    roles: dict[str, Engine],
    mesh: Mesh,
    meta: CheckpointMeta,
    state: dict[str, Any] | None = None,
    extra_files: ExtraFiles | None = None,
) -> None:
    """Write one checkpoint as the folder `final`, which appears whole, by one rename.

    Collective; `meta`, `state` and `extra_files(folder)` are rank 0's. Raises UserError for a full
    disk, and then leaves nothing; and for weights that are not finite: no run could continue from
    them.
    """
    work = final.with_name(final.name + ".tmp")
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
            with (work / "state.pt").open("wb") as file:
                torch.save(state or {}, file)
            if extra_files is not None:
                extra_files(work)
        written = digests(work, mesh)
        if mesh.is_main:
            described = {role: describe(engine) for role, engine in roles.items()}
            with_contents(meta, work, described, written).write(work)
            _rename(work, final)
    except UserError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    except (OSError, RuntimeError, torch_checkpoint.CheckpointException) as error:
        failed = _failed_write(error) or (_refused(work) if mesh.is_main else None)
        # also on a rank that lost the connection: torch may have made the folder there again
        shutil.rmtree(work, ignore_errors=True)
        if failed is None:
            raise
        about = refusal(failed)
        what = f"cannot write the checkpoint: {failed.strerror}"
        raise UserError(what, where=str(final), fix=about.fix) from error


def _rename(work: Path, final: Path) -> None:
    """Give a whole folder its name, in place of another one of it. The disk has all of it before:
    afterwards older checkpoints are removed."""
    for path in (*work.rglob("*"), work):
        to_disk(path)
    old = final.with_name(final.name + ".old")
    if final.exists():
        final.rename(old)
    work.rename(final)
    to_disk(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_hf_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _failed_write(error: BaseException) -> OSError | None:
    """Return the system's error of a write, on any rank, that failed; None for another failure."""
    found = [error]
    if isinstance(error, torch_checkpoint.CheckpointException):
        found = [wrapped[0] for wrapped in error.failures.values()]
    return next(filter(None, map(system_error, found)), None)


def _refused(folder: Path) -> OSError | None:
    """Return the system's error where it takes no file of 1 MiB; None where it does. torch writes
    mcore's common.pt in C++, whose errors lack the system's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        return error
    return None


def _save_role(folder: Path, engine: Engine) -> None:
    with (
        engine.residency.use(training=engine.optimisation is not None),
        host_mode(),
        torch.no_grad(),
    ):
        check_finite(engine, folder, _NOT_SAVED)
        torch.cuda.empty_cache()  # NCCL and gloo allocate past torch's cache
        chunks = sharded_chunks(engine)
        sharded = without_extra_states(chunks)
        common: dict[str, Any] = {"scaling": engine.scaling.to_save(list(chunks.values()))}
        if engine.optimisation is not None:
            optimizer = engine.optimizer.sharded_state_dict(
                sharded, is_loading=False, metadata=metadata()
            )
            # not the first replica; mcore compares what ranks have, and would warn
            if optimizer["param_state"] is None:
                del optimizer["param_state"]
            common["optimizer"] = optimizer
            common["learning_rate"] = engine.learning_rate.state_dict()
        if engine.group_head is not None:
            common["group_head"] = engine.group_head.sharded_state()
        dist_checkpointing.save(
            {**sharded, **common}, str(folder), sharded_strategy=InlineSave("torch_dist", 1)
        )


def describe(engine: Engine) -> RoleMeta:
    """Return the entry of meta.json for a model."""
    group, base = engine.group, engine.base
    adapted = base is not None and engine.adapter.rank > 0
    return RoleMeta(
        architecture=engine.architecture,
        head=engine.head,
        dtype=engine.precision.dtype,
        num_groups=None if group is None else group.num_groups,
        group_input=None if group is None else group.input,
        trained=engine.optimisation is not None,
        adapter=engine.adapter if adapted else None,
        base=base.meta if base is not None and adapted else None,
    )
