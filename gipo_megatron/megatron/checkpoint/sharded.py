"""A model as mcore's dist_checkpointing stores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import StorageMeta

from gipo_megatron.errors import system_error
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.param_sharding import ADAPTER, placements
from gipo_megatron.megatron.scaling import EXTRA_STATE


class _Writer(torch_checkpoint.FileSystemWriter):
    """torch's own, but for its errors and its index."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Raise the operating system's own error: torch hides it behind another, and drops it where
        it sends that to other ranks."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise system_error(error) or error from None

    def storage_meta(self) -> StorageMeta:
        """Leave out the folder's path and a random number: equal states have equal files."""
        return StorageMeta()


class InlineSave(TorchDistSaveShardedStrategy):
    """mcore's torch_dist format, written by this process: mcore's own writer starts a manager and
    forks, which takes seconds per save."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        grouped, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(grouped, False),
            storage_writer=_Writer(checkpoint_dir),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False,
                flatten_state_dict=False,
                can_run_decentralized_global_plan=False,
            ),
        )


def metadata() -> dict[str, Any]:
    """A new one for every call: mcore puts the data parallel group of the moment into it.

    mem_efficient: a replica group's optimizer is gathered in host memory (gloo) on its first rank,
    which writes it. Else every rank gathers all of it on its GPU: 4 bytes a parameter and as much
    again to receive, beside a model that fills the card.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def sharded_chunks(engine: Engine) -> dict[str, dict[str, Any]]:
    """Return {name in the checkpoint: the chunk's sharded state dict}: of the whole model or, with
    adapters, of these and a head alone."""
    found = _mcore_chunks(engine)
    if not engine.adapter.rank:
        return found
    for part, chunk in zip(found.values(), engine.chunks, strict=True):
        for key in [key for key in part if not key.endswith(EXTRA_STATE)]:
            del part[key]
        part |= _trained(chunk, engine)
    return found


def whole_chunks(engine: Engine) -> dict[str, dict[str, Any]]:
    """Return what to load from the checkpoint of a whole model: all but adapters, and but what the
    base has already."""
    found = _mcore_chunks(engine)
    if engine.base is None:
        return found
    for part, chunk in zip(found.values(), engine.chunks, strict=True):
        names = _names(chunk, engine)
        for key in [key for key in part if ADAPTER in key or names.get(key) in engine.base.filled]:
            del part[key]
    return found


def _mcore_chunks(engine: Engine) -> dict[str, dict[str, Any]]:
    count = len(engine.chunks)
    names = ["model"] if count == 1 else [f"model{i}" for i in range(count)]
    return {
        name: chunk.sharded_state_dict(metadata=metadata())
        for name, chunk in zip(names, engine.chunks, strict=True)
    }


def _names(chunk: GPTModel, engine: Engine) -> dict[str, str]:
    """Return {a parameter's name in the chunk: its name in the whole model}."""
    whole = {id(p): place.name for place, p in placements(chunk, engine.architecture.vocab_size)}
    return {name: whole[id(p)] for name, p in chunk.named_parameters()}


def _trained(chunk: GPTModel, engine: Engine) -> dict[str, Any]:
    """Return sharded tensors by the whole model's names. mcore would take an adapter's matrices for
    whole ones on each tensor rank."""
    mesh, parts = engine.mesh, dict[str, Any]()
    local = {id(p): name for name, p in chunk.named_parameters()}
    for place, parameter in placements(chunk, engine.architecture.vocab_size):
        if not parameter.requires_grad:
            continue
        cut = place.dim is not None
        tensor = ShardedTensor.from_rank_offsets(
            place.name,
            parameter,
            *([(place.dim, mesh.tensor_rank, mesh.tensor_size)] if cut else []),
            replica_id=(0, 0 if cut else mesh.tensor_rank, mesh.data_parallel.rank),
        )
        if place.blocks == 2:
            tensor = apply_swiglu_sharded_factory(tensor, ())
        parts[local[id(parameter)]] = tensor
    return parts
