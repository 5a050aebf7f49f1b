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
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from gipo_megatron.megatron import host
from gipo_megatron.megatron.microbatches import MicroBatch


class _OrderedP2P(P2PCommunicator):
    """Shapes travel in the same order as the tensors they announce.

    With two stages, both neighbours are the same rank. mcore's batched operations are matched by order alone, so in the interleaved
    schedule an activation's shape (or the activation) arrives where a gradient's was expected. The unbatched ones pair them rightly.
    """

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        device = torch.cuda.current_device()
        sent = [None if t is None else torch.tensor(t.shape, dtype=torch.int64, device=device) for t in (tensor_send_next, tensor_send_prev)]
        received = [torch.zeros(3, dtype=torch.int64, device=device) if wanted else None for wanted in (recv_prev, recv_next)]
        requests = _p2p_ops(
            tensor_send_prev=sent[1],
            tensor_recv_prev=received[0],
            tensor_send_next=sent[0],
            tensor_recv_next=received[1],
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        shapes = [[0, 0, 0] if shape is None else shape.tolist() for shape in received]
        return shapes[0], shapes[1]


def _groups() -> ProcessGroupCollection:
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return groups


def run(
    chunks: list[Any], slots: list[MicroBatch], finish: Callable[[MicroBatch, Tensor], Any], *, forward_only: bool
) -> list[Any]:
    """What `finish(slot, output)` returned for each slot, on the last stage; [] on the others. `chunks`: plain or DDP-wrapped.

    forward_only: `finish` may return anything; otherwise mcore's triple (loss, integer count, anything), and the last is listed.
    """

    def forward_step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        slot = next(iterator)
        with host.model_mode():
            out = chunk(slot.sequences.tokens, None, None)
        return out, partial(_finish, finish, slot)

    config: ModelParallelConfig = chunks[0].config
    arguments = {
        "forward_step_func": forward_step,
        "num_microbatches": len(slots),
        "seq_length": slots[0].sequences.tokens.shape[1],  # not what later slots have: shapes are sent along
        "micro_batch_size": len(slots[0].sequences),
        "forward_only": forward_only,
        "collect_non_loss_data": forward_only,
    }
    stages = dist.get_world_size(parallel_state.get_pipeline_model_parallel_group())
    with host.host_mode():
        if len(chunks) == 1:
            return get_forward_backward_func(stages, None)(data_iterator=iter(slots), model=chunks[0], **arguments)
        config.batch_p2p_comm = False
        groups = _groups()
        return get_forward_backward_func(stages, len(chunks))(
            data_iterator=[iter(slots) for _ in chunks],
            model=chunks,
            p2p_communicator=_OrderedP2P(groups.pp, config),
            pg_collection=groups,
            **arguments,
        )


def _finish(finish: Callable[[MicroBatch, Tensor], Any], slot: MicroBatch, out: Tensor, non_loss_data: bool = False) -> Any:
    with host.model_mode():
        return finish(slot, out)
