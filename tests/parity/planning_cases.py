"""What roles really hold on each rank, for the planner's predictions (tests/planning)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import (
    MegatronActor,
    MegatronCritic,
    MegatronReference,
    MegatronRewardModel,
)
from gipo_megatron.recipe.compose import compose
from gipo_megatron.specs import AdapterSpec, Architecture, Precision
from tests.parity.matrix import LAYOUTS
from tests.parity.roles import common, parts_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# dtype, rank of adapters on a base that all roles share
FORMATS = {"fp32": ("fp32", 0), "bf16": ("bf16", 0), "adapters": ("bf16", 2)}


def tiny_architecture() -> Architecture:
    """That of model/tiny: its four layers are two pipeline stages with two chunks each."""
    random = ["models.actor.load=random", "models.reward.load=random"]  # no run is read
    words = ["recipe=tiny/gipo", "with=model/tiny", *random]
    return compose(words, RECIPES, world=1).model.architecture


def held(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of every storage behind `tensors`."""
    storages = [t.untyped_storage() for t in tensors]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def state_bytes(engine: Any) -> list[int]:
    """Bytes of an engine's own weights, gradients, and what of its optimizer lies in neither."""
    if engine.optimisation is None:
        weights = [p for c in engine.chunks for p in c.parameters() if p.requires_grad]
        return [sum(held(weights).values()), 0, 0]
    buffers = [buffer for wrapped in engine._wrapped for buffer in wrapped.buffers]
    weights, gradients = held(b.param_data for b in buffers), held(b.grad_data for b in buffers)
    states = [p.data for group in engine.optimizer.param_groups for p in group["params"]]
    for part in engine.optimizer.chained_optimizers:
        states += [
            x
            for state in part.optimizer.state.values()
            for x in state.values()
            if isinstance(x, Tensor)
        ]
    own = {address: size for address, size in held(states).items() if address not in weights}
    return [sum(sizes.values()) for sizes in (weights, gradients, own)]


def allocated(mesh: Mesh, dtype: str, rank: int) -> dict[str, list[int]]:
    """Role -> bytes after an optimizer step (the trained ones), at the tiny recipe's architecture;
    with adapters, the base's, too."""
    arguments = common(
        mesh,
        architecture=tiny_architecture(),
        precision=Precision(dtype),
        adapter=AdapterSpec(rank=rank),
        base=Base() if rank else None,
    )
    frozen = {key: value for key, value in arguments.items() if key != "optimisation"}
    actor = MegatronActor(build_engine("actor", **arguments), eos_id=1, pad_id=0, decode=str)
    critic = MegatronCritic(build_engine("critic", **arguments))
    assert actor.update(*parts_of("actor", mesh)).skipped is None
    assert critic.update(*parts_of("critic", mesh)).skipped is None
    roles = {
        "actor": actor,
        "critic": critic,
        "reference": MegatronReference(build_engine("reference", **frozen)),
        "reward": MegatronRewardModel(build_engine("reward", **frozen)),
    }
    found = {name: state_bytes(role.engine) for name, role in roles.items()}
    if rank:
        frozen_bytes = held(
            p
            for role in roles.values()
            for chunk in role.engine.chunks
            for p in chunk.parameters()
            if not p.requires_grad
        )
        found["base"] = [sum(frozen_bytes.values()), 0, 0]
    return found


def run(world: int) -> dict[str, Any]:
    """layout/format -> what this rank holds."""
    found = {}
    for name, parallel in LAYOUTS[world].items():
        mesh = Mesh.create(parallel)
        with torch.random.fork_rng():
            for kind, (dtype, adapters) in FORMATS.items():
                found[f"{name}/{kind}"] = allocated(mesh, dtype, adapters)
    return found
