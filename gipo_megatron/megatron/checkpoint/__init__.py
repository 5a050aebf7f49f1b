"""Checkpoints: one folder per step, complete or absent, loadable at another tensor × pipeline ×
data split.

DIR/step_12/meta.json     CheckpointMeta: step, origin, roles, sizes and digests of all files
            state.pt      the caller's own state (generators, data position, running moments, …)
            actor/ …      mcore dist_checkpointing: weights, optimizer, learning rate, group head,
                          FP8 scaling state
            huggingface/  per role, config.json and generation_config.json of the model it came from
"""

from gipo_megatron.megatron.checkpoint.finite import check_finite
from gipo_megatron.megatron.checkpoint.folders import discard_after, link, prune
from gipo_megatron.megatron.checkpoint.reading import (
    check_architecture,
    load_weights,
    restore,
    source_of,
)
from gipo_megatron.megatron.checkpoint.writing import describe, save, write

__all__ = [
    "check_architecture",
    "check_finite",
    "describe",
    "discard_after",
    "link",
    "load_weights",
    "prune",
    "restore",
    "save",
    "source_of",
    "write",
]
