"""What any rank of any world would hold of a model, found without allocating it: the real modules,
on the meta device.

The process pretends to be one rank of the world (torch's fake backend: groups without peers,
collectives that do nothing), builds what Engine builds, and counts the storages. Nothing here may
run where a real process group is: a plan is a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.megatron.optimizer import build_optimizer, mark_shards, wrap
from gipo_megatron.megatron.param_sharding import EMBEDDING, placements
from gipo_megatron.specs import Architecture, Optimisation, Parallel, Precision

META = torch.device("meta")


@dataclass(frozen=True)
class Shard:
    """One rank's part of one model, in bytes. Of tensors that share a storage it is counted once,
    as weights rather than optimizer."""

    rank: int
    stage: int  # pipeline rank
    chunk_layers: tuple[int, ...]  # decoder layers of each model chunk
    # of the whole model's, those that this pipeline stage holds: without padding, copies, and the
    # split over tensor
    parameters: int
    weights: int
    gradients: int  # mcore's fp32 buffer; 0 for a model that is not trained
    optimizer: int  # fp32 masters and Adam's moments of this rank's share

    @property
    def layers(self) -> int:
        return sum(self.chunk_layers)

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer


@contextmanager
def pretend(parallel: Parallel, world: int, rank: int) -> Iterator[Mesh]:
    """The mesh of rank `rank` of `world`, without the others. Raises UserError when the world does
    not factor."""
    assert not dist.is_initialized(), (
        "a plan needs a process of its own: this one is in a process group"
    )
    assert not torch.cuda.is_available(), (
        "a plan is made without GPUs: start it with CUDA_VISIBLE_DEVICES empty"
    )
    real = dist.new_group

    def fake_group(ranks: list[int], **arguments: Any) -> Any:
        return real(ranks, **{**arguments, "backend": "fake"})  # mcore asks for gloo by name

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mesh = None
    try:
        with patch.object(dist, "new_group", fake_group):
            mesh = Mesh.create(parallel)
        with (
            torch.device(META),
            _PlainTypes(),
            patch.object(torch.cuda, "current_device", lambda: META),
        ):
            yield replace(mesh, device=META, data_parallel=replace(mesh.data_parallel, device=META))
    finally:
        if mesh is not None:
            mesh.close()
        elif dist.is_initialized():
            dist.destroy_process_group()


class _PlainTypes(TorchFunctionMode):
    """A meta tensor answers to its host type's name, which host.host_mode turns into the one that
    mcore's optimizers test for."""

    def __torch_function__(
        self, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return (
            result.replace("torch.meta.", "torch.")
            if func is Tensor.type and isinstance(result, str)
            else result
        )


def build(
    architecture: Architecture, mesh: Mesh, precision: Precision, *, head: str | None, trained: bool
) -> Shard:
    """The shard that `mesh`'s rank (of `pretend`) holds. FP8 keeps its weights in bf16, so it is
    built as bf16.

    Raises UserError when the architecture cannot be split over the mesh.
    """
    precision = replace(precision, fp8="none")
    chunks = build_chunks(architecture, mesh, precision, head=head, initialise=False)
    parameters, seen = 0, set()
    for chunk in chunks:
        for place, parameter in placements(chunk, architecture.vocab_size):
            copy = place.name == EMBEDDING and not mesh.is_first_stage  # of tied embeddings
            if not copy and place.name not in seen:
                seen.add(place.name)
                parameters += torch.Size(place.full_shape(parameter, mesh.tensor_size)).numel()
    layers = tuple(len(chunk.decoder.layers) for chunk in chunks)
    weights: list[Tensor] = [p for chunk in chunks for p in chunk.parameters()]
    gradients: list[Tensor] = []
    states: list[Tensor] = []
    if trained:
        mark_shards(chunks, architecture.vocab_size)
        wrapped = wrap(chunks)
        optimizer = build_optimizer(wrapped, Optimisation(lr=1.0), precision)
        weights = [b.param_data for w in wrapped for b in w.buffers]
        gradients = [b.grad_data for w in wrapped for b in w.buffers]
        states = [p for group in optimizer.param_groups for p in group["params"]]
        for part in optimizer.chained_optimizers:
            states += [
                x
                for state in part.optimizer.state.values()
                for x in state.values()
                if isinstance(x, Tensor)
            ]
    return Shard(
        rank=mesh.rank,
        stage=mesh.pipeline_rank,
        chunk_layers=layers,
        parameters=parameters,
        weights=num_bytes(weights),
        gradients=num_bytes(gradients),
        optimizer=num_bytes(states, but=weights),
    )


def num_bytes(tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages behind `tensors`, without those that are behind `but`, too."""
    others = {t.untyped_storage()._cdata for t in but}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for key, size in storages.items() if key not in others)


def groups(parallel: Parallel, world: int) -> dict[str, list[list[int]]]:
    """Global ranks of every tensor, pipeline and data parallel group, in mcore's own order."""
    data = world // parallel.model
    ranks = RankGenerator(
        tp=parallel.tensor, ep=1, dp=data, pp=parallel.pipeline, cp=1, order="tp-cp-ep-dp-pp"
    )
    return {
        name: ranks.get_ranks(token)
        for name, token in (("tensor", "tp"), ("pipeline", "pp"), ("data", "dp"))
    }
