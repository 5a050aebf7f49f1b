"""mcore's schedules over a list of micro-batches: none, 1F1B or interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from gipo_megatron.megatron import cpu_compat
from gipo_megatron.megatron.microbatches import MicroBatch


class _PlannedP2P(P2PCommunicator):
    """Messages between neighbours. Every stage makes the same plan of a pass, so it has the shapes
    of all tensors that it receives, and none is sent before them (mcore's variable_seq_lengths)."""

    def __init__(
        self, group: dist.ProcessGroup, config: Any, slots: list[MicroBatch], chunks: int
    ) -> None:
        super().__init__(group, config)
        stages, stage = group.size(), group.rank()
        table = get_schedule_table(len(slots), chunks, stages)
        every = [self._shape(slots[i]) for i, _ in table]
        # the first stage has the input of its first chunk, the last the gradient of its last one
        inner = [self._shape(slots[i]) for i, chunk in table if chunk]
        self._inputs = iter(inner if stage == 0 else every)
        self._gradients = iter(inner if stage == stages - 1 else every)

    def _shape(self, slot: MicroBatch) -> tuple[int, int, int]:
        config: Any = self.config
        rows, width = slot.sequences.tokens.shape
        shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return width // shards, rows, config.hidden_size

    def _communicate(self, **message: Any) -> Any:
        """Give mcore the shape of the one tensor that 1F1B receives at a time."""
        if message["recv_prev"] or message["recv_next"]:
            shapes = self._inputs if message["recv_prev"] else self._gradients
            message["tensor_shape"] = next(shapes)
        return super()._communicate(**message)


class _TwoWayP2P(_PlannedP2P):
    """Messages in the interleaved schedule, with activations and gradients apart.

    With two stages both neighbours are the same rank, and messages between two ranks are matched by
    their order alone. mcore's own communicator then takes an activation for a gradient, unnoticed
    where shapes are equal. Here activations use the pipeline's group, and gradients, with two
    stages, the world's.
    """

    def _communicate(self, **message: Any) -> tuple[Tensor | None, Tensor | None, None]:
        ways = (("recv_prev", self._inputs), ("recv_next", self._gradients))
        received = [self._empty(next(shapes)) if message[way] else None for way, shapes in ways]
        sends, arriving = self._post(
            message["tensor_send_next"], received[0], message["tensor_send_prev"], received[1]
        )
        for request in arriving + sends:
            request.wait()
        return received[0], received[1], None

    def _empty(self, shape: tuple[int, int, int]) -> Tensor:
        dtype, device = self.config.pipeline_dtype, torch.cuda.current_device()
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=True)

    def _post(
        self,
        send_next: Tensor | None,
        recv_prev: Tensor | None,
        send_prev: Tensor | None,
        recv_next: Tensor | None,
    ) -> tuple[list[dist.Work], list[dist.Work]]:
        """Start all sends and receives. Returns (sends, receives)."""
        forward = self.pp_group
        backward = dist.group.WORLD if self.pp_group.size() == 2 else self.pp_group
        sends = [(send_next, self.next_rank, forward), (send_prev, self.prev_rank, backward)]
        receives = [(recv_prev, self.prev_rank, forward), (recv_next, self.next_rank, backward)]
        sent: list[dist.Work] = []
        received: list[dist.Work] = []
        for send, receive in zip(sends, receives, strict=True):
            # NCCL runs the operations of a group in order: even ranks send first, odd ranks receive
            # first
            ways = [(dist.isend, send, sent), (dist.irecv, receive, received)]
            if self.pp_group.rank() % 2:
                ways.reverse()
            for start, (tensor, peer, group), requests in ways:
                if tensor is not None:
                    request = start(tensor.detach(), peer, group=group)
                    assert request is not None, "this rank is not in the group"
                    requests.append(request)
        return sent, received


def _groups() -> ProcessGroupCollection:
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=False
    )
    return groups


def run(
    chunks: list[Any],
    slots: list[MicroBatch],
    finish: Callable[[MicroBatch, Tensor], Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run the slots through `chunks`, plain or DDP-wrapped. Returns the result of `finish(slot,
    output)` for each slot on the last stage, [] on the others.

    With forward_only `finish` may return anything. Otherwise it returns mcore's triple (loss,
    integer count, anything), of which the last is in the list.
    """

    def forward_step(
        iterator: Iterator[MicroBatch], chunk: Any
    ) -> tuple[Tensor, Callable[..., Any]]:
        slot = next(iterator)
        with cpu_compat.model_mode():
            out = chunk(slot.sequences.tokens, None, None)
        return out, partial(_finish, finish, slot)

    config: ModelParallelConfig = chunks[0].config
    arguments = {
        "forward_step_func": forward_step,
        "num_microbatches": len(slots),
        # of the first slot only; _PlannedP2P has the others' shapes
        "seq_length": slots[0].sequences.tokens.shape[1],
        "micro_batch_size": len(slots[0].sequences),
        "forward_only": forward_only,
        "collect_non_loss_data": forward_only,
    }
    groups = _groups()
    stages = groups.pp.size()
    if len(chunks) > 1:
        config.batch_p2p_comm = False
    if stages > 1:
        kind = _TwoWayP2P if len(chunks) > 1 else _PlannedP2P
        arguments["p2p_communicator"] = kind(groups.pp, config, slots, len(chunks))
        arguments["pg_collection"] = groups
    with cpu_compat.host_mode():
        return get_forward_backward_func(stages, len(chunks) if len(chunks) > 1 else None)(
            data_iterator=[iter(slots) for _ in chunks], model=chunks, **arguments
        )


def _finish(
    finish: Callable[[MicroBatch, Tensor], Any],
    slot: MicroBatch,
    out: Tensor,
    non_loss_data: bool = False,
) -> Any:
    with cpu_compat.model_mode():
        return finish(slot, out)
