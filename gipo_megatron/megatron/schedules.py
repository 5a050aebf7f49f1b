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
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from gipo_megatron.megatron import cpu_compat
from gipo_megatron.megatron.microbatches import MicroBatch


class _TwoWayP2P(P2PCommunicator):
    """Messages between neighbours in the interleaved schedule, with activations and gradients
    apart.

    With two stages both neighbours are the same rank, and messages between two ranks are matched by
    their order alone. mcore's own communicator then takes an activation for a gradient, unnoticed
    where shapes are equal. Here activations use the pipeline's group, and gradients, with two
    stages, the world's. The shape of a tensor is sent before it.
    """

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        host_int: dict[str, Any] = {"dtype": torch.int64, "device": torch.cuda.current_device()}
        sent = [
            None if t is None else torch.tensor(t.shape, **host_int)
            for t in (tensor_send_next, tensor_send_prev)
        ]
        shapes = [
            torch.zeros(3, **host_int) if wanted else None for wanted in (recv_prev, recv_next)
        ]
        pending, arriving = self._post(sent[0], shapes[0], sent[1], shapes[1])
        # not the sends: at the ends of a schedule the peer may first wait for its own tensors
        for request in arriving:
            request.wait()
        dtype, device = self.config.pipeline_dtype, torch.cuda.current_device()
        received: list[Tensor | None] = [None, None]
        for i, shape in enumerate(shapes):
            if shape is not None:
                size = shape.tolist()
                received[i] = torch.empty(size, dtype=dtype, device=device, requires_grad=True)
        more, arriving = self._post(tensor_send_next, received[0], tensor_send_prev, received[1])
        for request in arriving + pending + more:
            request.wait()
        return received[0], received[1], None

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
        # later slots may differ: shapes are sent along
        "seq_length": slots[0].sequences.tokens.shape[1],
        "micro_batch_size": len(slots[0].sequences),
        "forward_only": forward_only,
        "collect_non_loss_data": forward_only,
    }
    stages = dist.get_world_size(parallel_state.get_pipeline_model_parallel_group())
    with cpu_compat.host_mode():
        if len(chunks) == 1:
            return get_forward_backward_func(stages, None)(
                data_iterator=iter(slots), model=chunks[0], **arguments
            )
        config.batch_p2p_comm = False
        groups = _groups()
        return get_forward_backward_func(stages, len(chunks))(
            data_iterator=[iter(slots) for _ in chunks],
            model=chunks,
            p2p_communicator=_TwoWayP2P(groups.pp, config),
            pg_collection=groups,
            **arguments,
        )


def _finish(
    finish: Callable[[MicroBatch, Tensor], Any],
    slot: MicroBatch,
    out: Tensor,
    non_loss_data: bool = False,
) -> Any:
    with cpu_compat.model_mode():
        return finish(slot, out)
