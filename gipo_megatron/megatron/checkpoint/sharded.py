"""A model as mcore's dist_checkpointing stores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint

from gipo_megatron.megatron.engine import Engine


class InlineSave(TorchDistSaveShardedStrategy):
    """mcore's torch_dist format, written by this process: mcore's own writer starts a manager and
    forks, which takes seconds per save."""

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
    """Return {name in the checkpoint: the chunk's sharded state dict}."""
    count = len(engine.chunks)
    names = ["model"] if count == 1 else [f"model{i}" for i in range(count)]
    return {
        name: chunk.sharded_state_dict(metadata=metadata())
        for name, chunk in zip(names, engine.chunks, strict=True)
    }
