"""Roles on the tiny model of tests/parity/tiny.py at any layout, the batches of a replica, and a
hash of what a role holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.hf import load_hf
from gipo_megatron.megatron.hf_adapters import export_adapters, load_adapters
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor, MegatronCritic, MegatronRewardModel
from gipo_megatron.specs import Optimisation, Precision
from gipo_megatron.types import Loss, Rows
from tests.parity.tiny import (
    ARCHITECTURE,
    GROUP,
    critic_loss,
    hf_model,
    language_loss,
    pair_loss,
    pairs,
    ppo_loss,
    pretraining,
    score_weight,
    weighted,
)
from tools.gpu.tiny_adapters import adapter_tensors

ADAM = Optimisation(lr=1e-3, warmup_steps=2)


def mine(mesh: Mesh, rows: Rows) -> Rows:
    """Global row i is row i // D of replica i % D."""
    data = mesh.data_parallel
    return rows.select(torch.arange(data.rank, len(rows), data.size))


def common(mesh: Mesh, **changes: Any) -> dict[str, Any]:
    """What `build_engine` takes."""
    base = {
        "mesh": mesh,
        "architecture": ARCHITECTURE,
        "precision": Precision("fp32"),
        "micro_batch": 2,
    }
    return {**base, "optimisation": ADAM, **changes}


def engine(role: str, mesh: Mesh, **changes: Any) -> Engine:
    return build_engine(role, **common(mesh, **changes))


def fill(role: Any, model: LlamaForCausalLM | None = None) -> Any:
    """The Hugging Face weights (`tiny.hf_model`, unless given) in a role's model; in its adapters
    the given model's, or the tensors of tools/gpu/tiny_adapters.py."""
    weights = {name: p.detach() for name, p in (model or hf_model()).named_parameters()}
    if role.engine.head is not None:
        weights["score.weight"] = score_weight()
    engine = role.engine
    whole = {name: tensor for name, tensor in weights.items() if "lora_" not in name}
    load_hf(whole, engine.chunks, engine.mesh, ARCHITECTURE, head=engine.head)
    if engine.adapter.rank:
        weights = adapter_tensors(engine.adapter) | weights
        wanted = {k: v for k, v in weights.items() if "lora_" in k or k == "score.weight"}
        place = engine.chunks, engine.mesh, ARCHITECTURE, engine.adapter
        load_adapters(wanted, *place, head=engine.head)
    engine.weights_changed()
    return role


def new_actor(mesh: Mesh, **changes: Any) -> MegatronActor:
    return fill(MegatronActor(engine("actor", mesh, **changes), eos_id=1, pad_id=0, decode=str))


def new_critic(mesh: Mesh, **changes: Any) -> MegatronCritic:
    return fill(MegatronCritic(engine("critic", mesh, **{"group": GROUP, **changes})))


def new_reward(mesh: Mesh, **changes: Any) -> MegatronRewardModel:
    return fill(MegatronRewardModel(engine("reward", mesh, **changes)))


def parts_of(kind: str, mesh: Mesh) -> list[tuple[Rows, Callable[..., Loss]]]:
    if kind == "actor":
        return [(mine(mesh, weighted()), ppo_loss), (mine(mesh, pretraining()), language_loss)]
    if kind == "text":
        return [(mine(mesh, pretraining()), language_loss)]
    return (
        [(mine(mesh, weighted()), critic_loss)]
        if kind == "critic"
        else [(mine(mesh, pairs()), pair_loss)]
    )


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    return _hashed(tensors).hexdigest()


def _hashed(tensors: Iterable[tuple[str, Tensor]]) -> Any:
    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state


def digest(role: Any) -> str:
    engine = role.engine
    state = _hashed(engine.export())
    if engine.adapter.rank:  # merged, their last bits would be lost
        place = engine.chunks, engine.mesh, ARCHITECTURE, engine.adapter
        state.update(digest_of(export_adapters(*place, head=engine.head)).encode())
    if engine.group_head is not None and engine.mesh.is_last_stage:
        state.update(engine.group_head.weight.detach().numpy().tobytes())
    return state.hexdigest()
