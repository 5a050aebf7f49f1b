"""A check of weights that were loaded, or are about to be saved."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.param_sharding import placements

SHOWN = 4  # tensors
STATE = "the optimizer's state"


@torch.no_grad()
def check_finite(engine: Engine, where: Path, fix: str) -> None:
    """Raise UserError, the same on every rank, that names the tensors with a NaN or an infinity.
    Collective. One such weight makes every output NaN, which no later step can undo."""
    vocabulary = engine.architecture.vocab_size
    named: list[tuple[str, Tensor]] = [
        (place.name, parameter)
        for chunk in engine.chunks
        for place, parameter in placements(chunk, vocabulary)
    ]
    if engine.group_head is not None and engine.mesh.is_last_stage:
        named += [("group_head", parameter) for parameter in engine.group_head.parameters()]
    if engine.optimisation is not None:
        named += [(STATE, x) for x in engine.optimizer_tensors()]
    largest = torch._foreach_norm([x.detach() for _, x in named], math.inf)
    finite = torch.stack([x.float() for x in largest]).isfinite().tolist()
    mine = [name for (name, _), good in zip(named, finite, strict=True) if not good]
    everyone = engine.mesh.everyone(mine)
    if found := list(dict.fromkeys(name for names in everyone for name in names)):
        found = [name for name in found if name != STATE] or found  # it has copies of the weights
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        what = f"NaN or infinity in {', '.join(found[:SHOWN])}{more}"
        raise UserError(what, where=str(where), fix=fix)
