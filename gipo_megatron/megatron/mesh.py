"""Process groups for tensor, pipeline and data parallelism, on torch.distributed and mcore's
parallel_state."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from gipo_megatron.errors import UserError, library_errors, system_errors
from gipo_megatron.megatron import cpu_compat
from gipo_megatron.megatron.watch import EXCHANGE, Watch
from gipo_megatron.roles import T
from gipo_megatron.specs import Parallel

_FAILURE = "gipo_megatron/failure"
_PATIENCE = timedelta(days=365)  # of ranks that wait for rank 0's own work
_layout: tuple[int, int, int] | None = None  # tensor, pipeline, virtual pipeline of mcore's groups
_waiting: dist.ProcessGroup | None = None  # all ranks; lives as long as mcore's groups


@dataclass(frozen=True)
class DataParallelGroup:
    """The replicas of the model (roles.DataParallel). Sums keep the tensor's dtype and device."""

    rank: int
    size: int
    group: dist.ProcessGroup
    device: torch.device

    def _reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return x
        y = x.detach().to(self.device, copy=True).contiguous()
        dist.all_reduce(y, op=op, group=self.group)
        return y.to(x.device)

    def sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the tensor × pipeline × data grid. Ranks count tensor first, then data,
    then pipeline.

    A replica is the tensor × pipeline ranks that hold one copy of the model. They all see the same
    batch.
    """

    parallel: Parallel
    device: torch.device
    rank: int
    world: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_parallel: DataParallelGroup
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    model_group: dist.ProcessGroup  # the replica
    last_stage_rank: int  # global rank of this rank's pipeline's last stage
    # all ranks, over TCP, where others wait for rank 0; None in a world of one
    waiting_group: dist.ProcessGroup | None

    @staticmethod
    def create(parallel: Parallel, seed: int = 0, deterministic: bool = False) -> Mesh:
        """Start torch.distributed where it is not started (torchrun's environment, or one process),
        then mcore's groups and seeds.

        It may be called again in the same world. Other sizes replace the groups and make the
        earlier mesh invalid. `deterministic` (cpu_compat.make_deterministic) holds for the rest of
        the process. Raises UserError when the world is no such grid.
        """
        cpu_compat.install()
        if deterministic:
            cpu_compat.make_deterministic()
        device = _device()
        started = dist.is_initialized()
        world = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
        check_factors(parallel, world)
        if not started:
            _start(device, parallel.timeout)
        _make_groups(parallel)
        _seed(seed)
        data = parallel_state.get_data_parallel_group()
        return Mesh(
            parallel=parallel,
            device=device,
            rank=dist.get_rank(),
            world=world,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_size=parallel.tensor,
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pipeline_size=parallel.pipeline,
            data_parallel=DataParallelGroup(data.rank(), data.size(), data, device),
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
            model_group=parallel_state.get_model_parallel_group(),
            last_stage_rank=parallel_state.get_pipeline_model_parallel_last_rank(),
            waiting_group=_waiting,
        )

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        """True on rank 0 of the world, which writes and prints."""
        return self.rank == 0

    @property
    def replica(self) -> int:
        """The index of this rank's replica; rank 0 is in the first."""
        return self.data_parallel.rank

    def broadcast_from_last_stage(self, x: Tensor) -> Tensor:
        """Overwrite `x` (same shape and dtype on every stage) with the last stage's, in place."""
        if self.pipeline_size > 1:
            dist.broadcast(x, src=self.last_stage_rank, group=self.pipeline_group)
        return x

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank of the world. Collective."""
        if self.world == 1:
            return flag
        votes = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0; its value is returned, or its UserError raised, on every rank.
        Collective. An error of the operating system is raised as a UserError.

        The action may take any time: the other ranks wait without a time limit, and end with an
        error as soon as rank 0's process does, or hangs (watch.py).
        """
        value: Any = None
        refused: UserError | None = None
        if self.is_main:
            try:
                with system_errors():
                    value = action()
            except UserError as error:
                refused = error
        if self.waiting_group is not None:
            outcome = [value, refused]
            dist.broadcast_object_list(outcome, src=0, group=self.waiting_group)
            value, refused = outcome
        if refused is not None:
            raise refused
        return cast(T, value)

    def gather(self, value: T) -> list[T]:
        """Return every replica's `value`, replica r's at r. Collective."""
        group = self.data_parallel
        gathered = [value] * group.size
        if group.size > 1:
            dist.all_gather_object(gathered, value, group=group.group)
        return gathered

    def everyone(self, value: T) -> list[T]:
        """Return every rank's `value`, rank r's at r. Collective."""
        gathered = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(gathered, value)
        return gathered

    def report(self, failure: str) -> str:
        """Publish this rank's error, and return the first of all ranks: other ranks have errors
        because of it."""
        return _store().compare_set(_FAILURE, "", failure).decode()

    def reported(self) -> str:
        """Return the error of a rank that stopped, or "". Not collective."""
        store = _store()
        return store.get(_FAILURE).decode() if store.check([_FAILURE]) else ""

    def close(self) -> None:
        """Leave the groups and torch.distributed. The mesh is invalid afterwards."""
        _free_groups()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def mesh_session(parallel: Parallel, seed: int = 0, deterministic: bool = False) -> Iterator[Mesh]:
    """Yield a mesh and close it.

    A UserError on one rank is raised on all: when a rank stops, its connections break, and the
    others would show that instead of the reason. A rank that hangs ends all of them. An error of
    the operating system, as of a full disk, is raised as a UserError.
    """
    with Watch(parallel.timeout) as watch:
        mesh = Mesh.create(parallel, seed, deterministic)
        try:
            with system_errors():
                yield mesh
        except UserError as error:
            if (first := mesh.report(str(error))) != str(error):
                raise UserError(first) from None
            raise
        except Exception as error:
            if reason := mesh.reported() or watch.late(error) or cut_off(error):
                raise UserError(reason) from None
            raise
        finally:
            mesh.close()


def cut_off(error: Exception) -> str:
    """Return the message for an exchange that broke off because the process of another rank has
    ended; "" for another error. Gloo's have no class of their own."""
    if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        return ""
    what = "the connection to another rank broke off: its process has ended, or its machine"
    fix = "look at that rank's own message; then start again: the same command continues"
    return str(UserError(what, fix=fix))


def _make_groups(parallel: Parallel) -> None:
    """Set up mcore's groups for these sizes, or keep them where the sizes are the same."""
    global _layout, _waiting
    layout = (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline)
    if parallel_state.model_parallel_is_initialized():
        if layout == _layout:
            return
        _free_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        distributed_timeout_minutes=_exchange(parallel.timeout).total_seconds() / 60,
    )
    _layout = layout
    if dist.get_world_size() > 1:
        _waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)


def _free_groups() -> None:
    """Destroy mcore's groups. mcore only drops its references; each gloo group keeps threads."""
    global _layout, _waiting
    parallel_state.destroy_model_parallel()
    for group in [*dist.distributed_c10d._world.pg_map] if dist.is_initialized() else []:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    _layout, _waiting = None, None


def check_factors(parallel: Parallel, world: int) -> None:
    """Raises UserError when the sizes do not fit `world` ranks."""
    for error in parallel.problems(world):
        raise error


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _exchange(timeout: float) -> timedelta:
    return timedelta(seconds=EXCHANGE * timeout)


def _start(device: torch.device, timeout: float) -> None:
    """Start torch.distributed. On CUDA it is bound to this rank's device: NCCL then connects here,
    not in the first collective, and a barrier uses the right device."""
    cuda = device.type == "cuda"
    backend, bound = ("cpu:gloo,cuda:nccl", device) if cuda else ("gloo", None)
    alone: dict[str, Any] = {}
    if "WORLD_SIZE" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    fix = "start all of them; where the port is taken, set another MASTER_PORT"
    with library_errors("the run's processes cannot meet", where=place, fix=fix):
        limit = _exchange(timeout)
        dist.init_process_group(backend, device_id=bound, timeout=limit, **alone)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _seed(seed: int) -> None:
    """Seed mcore's trackers. On a host they use torch's global generator, which is then restored:
    nothing here draws from it."""
    before = torch.default_generator.get_state()
    model_parallel_cuda_manual_seed(seed)
    torch.default_generator.set_state(before)
