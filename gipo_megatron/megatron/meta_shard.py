"""A model's bytes on any rank of any world, counted on the real modules without allocating them, on
the meta device.

The process acts as one rank of the world (torch's fake backend: groups without peers, collectives
that do nothing), builds what Engine builds, and counts the storages. It must not run in a process
that has a real process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import RankGenerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.cpu_compat import on_meta
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.megatron.optimizer import build_optimizer, mark_shards, wrap
from gipo_megatron.megatron.param_sharding import EMBEDDING, placements
from gipo_megatron.specs import AdapterSpec, Architecture, Optimisation, Parallel, Precision

META = torch.device("meta")


@dataclass(frozen=True)
class Shard:
    """One rank's part of one model, in bytes. A storage that several tensors share is counted once,
    as weights rather than optimizer. A model with adapters holds these and a head; the base that it
    shares with others is apart."""

    rank: int
    stage: int  # pipeline rank
    chunk_layers: tuple[int, ...]  # decoder layers of each model chunk
    # of this pipeline stage, before the split over tensor; no padding, no copies, no base
    parameters: int
    weights: int
    gradients: int  # mcore's fp32 buffer; 0 for a model that is not trained
    optimizer: int  # fp32 masters and Adam's moments of this rank's share
    base: int = 0  # frozen weights
    base_parameters: int = 0

    @property
    def layers(self) -> int:
        return sum(self.chunk_layers)

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer


@contextmanager
def pretend(parallel: Parallel, world: int, rank: int) -> Iterator[Mesh]:
    """Yield the mesh of rank `rank` of `world`, without the others. Raises UserError when the world
    is no such grid."""
    assert not dist.is_initialized(), "a plan needs a process without a process group"
    assert not torch.cuda.is_available(), "a plan needs CUDA_VISIBLE_DEVICES to be empty"
    real = dist.new_group

    def fake_group(ranks: list[int] | None = None, **arguments: Any) -> Any:
        return real(ranks, **{**arguments, "backend": "fake"})  # instead of gloo

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mesh = None
    try:
        with patch.object(dist, "new_group", fake_group):
            mesh = Mesh.create(parallel)
        with on_meta(), _PlainTypes():
            yield replace(mesh, device=META, data_parallel=replace(mesh.data_parallel, device=META))
    finally:
        if mesh is not None:
            mesh.close()
        elif dist.is_initialized():
            dist.destroy_process_group()


class _PlainTypes(TorchFunctionMode):
    """Gives a meta tensor its host type's name, which cpu_compat.host_mode turns into the name that
    mcore's optimizers test."""

    def __torch_function__(
        self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.type and isinstance(result, str):
            return result.replace("torch.meta.", "torch.")
        return result


def build(
    architecture: Architecture,
    mesh: Mesh,
    precision: Precision,
    *,
    head: str | None,
    trained: bool,
    adapter: AdapterSpec = AdapterSpec(),
) -> Shard:
    """Build the shard of `mesh`'s rank (of `pretend`). FP8, whose weights are bf16, is built as
    bf16.

    Raises UserError when the architecture cannot be split over the mesh.
    """
    precision = replace(precision, fp8="none")
    base = Base() if adapter.rank else None
    chunks = build_chunks(
        architecture, mesh, precision, head=head, adapter=adapter, base=base, initialise=False
    )
    every = [p for chunk in chunks for p in chunk.parameters()]
    weights: list[Tensor] = [p for p in every if p.requires_grad]
    gradients: list[Tensor] = []
    states: list[Tensor] = []
    parameters = _count(chunks, architecture, mesh, frozen=False)
    base_parameters = _count(chunks, architecture, mesh, frozen=True)
    if trained:
        mark_shards(chunks, architecture.vocab_size)
        wrapped = wrap(chunks)
        optimizer = build_optimizer(wrapped, Optimisation(lr=1.0), precision)
        weights = [b.param_data for w in wrapped for b in w.buffers]
        gradients = [b.grad_data for w in wrapped for b in w.buffers]
        states = [p for group in optimizer.param_groups for p in group["params"]]
        for part in optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                states += [x for x in state.values() if isinstance(x, Tensor)]
    return Shard(
        rank=mesh.rank,
        stage=mesh.pipeline_rank,
        chunk_layers=tuple(len(chunk.decoder.layers) for chunk in chunks),
        parameters=parameters,
        weights=num_bytes(weights),
        gradients=num_bytes(gradients),
        optimizer=num_bytes(states, but=weights),
        base=num_bytes(p for p in every if not p.requires_grad),
        base_parameters=base_parameters,
    )


def _count(chunks: list[GPTModel], architecture: Architecture, mesh: Mesh, frozen: bool) -> int:
    """Return the parameters of this stage that are frozen, or those that are not. The output
    layer's copy of tied embeddings counts on the first stage only."""
    sizes = {}
    for chunk in chunks:
        for place, parameter in placements(chunk, architecture.vocab_size):
            elsewhere = place.name == EMBEDDING and not mesh.is_first_stage
            if parameter.requires_grad is not frozen and not elsewhere:
                sizes[place.name] = math.prod(place.full_shape(parameter, mesh.tensor_size))
    return sum(sizes.values())


def num_bytes(tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the distinct storages of `tensors`, without the storages of `but`."""
    others = {t.untyped_storage()._cdata for t in but}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for key, size in storages.items() if key not in others)


def groups(parallel: Parallel, world: int) -> dict[str, list[list[int]]]:
    """Return the global ranks of every tensor, pipeline and data parallel group, in mcore's
    order."""
    sizes = {"tp": parallel.tensor, "dp": world // parallel.model, "pp": parallel.pipeline}
    ranks = RankGenerator(**sizes, ep=1, cp=1, order="tp-cp-ep-dp-pp")
    names = {"tensor": "tp", "pipeline": "pp", "data": "dp"}
    return {name: ranks.get_ranks(short) for name, short in names.items()}
