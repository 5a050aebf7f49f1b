"""Cutting a batch into micro-batches: similar lengths together, nothing wider than its longest
sequence.

    rows          7 2 5 3 6          (lengths)         micro_batch 2
    micro-batches [7 6] [5 3] [2]    longest first: what does not fit in memory shows at once

A micro-batch keeps its rows whole ([b, T] as the caller knows them); only what the model reads is
trimmed, and what the model answers is padded back to T. So a loss never sees the trimming.

All sizes are found on the host, before the batch goes to the device: no later step waits there to
learn one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gipo_megatron.megatron.outputs import response_positions
from gipo_megatron.types import BatchLoss, CriticOutput, Output, Rows, Sequences, TokenStats

HOST = torch.device("cpu")


@dataclass(frozen=True)
class MicroBatch:
    """One pipeline slot."""

    rows: Rows
    index: Tensor  # int64 [b] on the host, places of `rows` in their batch
    sequences: Sequences  # trimmed
    # int64 [n], readout.response_positions of the trimmed mask; None where a first token is masked
    positions: Tensor | None
    width: int  # T of the rows
    loss: BatchLoss | None = None
    counts: dict[str, float] | None = None  # global units of this part's batch
    idle: bool = False  # fills a pipeline; counts for nothing


# (what the last stage's chunk returned, the slot that it read) -> Output
Readout = Callable[[Tensor, MicroBatch], Output]


def padded_length(longest: int, length_multiple: int, device: torch.device) -> int:
    """`longest` rounded up to `length_multiple`; on a GPU also to 64 tokens, and above 512 to 128.

    Each new shape costs a GPU time (plans of fused attention, compiled kernels, blocks of the
    allocator), so there are few of them. The width may go beyond the model's positions: RoPE is
    computed for any width, and no real token looks at the padding behind it.
    """
    if device.type != "cpu":
        length_multiple = math.lcm(length_multiple, 64 if longest <= 512 else 128)
    return -(-longest // length_multiple) * length_multiple


def plan(
    batch: Rows,
    micro_batch: int,
    device: torch.device = HOST,
    *,
    length_multiple: int = 1,
    slot_multiple: int = 1,
) -> list[MicroBatch]:
    """Micro-batches of at most `micro_batch` rows on `device`, longest first.

    length_multiple: widths are rounded up to it (sequence parallelism).  slot_multiple: their
    number is a multiple of it
    (interleaved pipelines); rows are spread thinner first, then idle slots repeat one row.
    Raises ValueError for a batch without rows.
    """
    num_rows = len(batch)
    if num_rows == 0:
        raise ValueError("a batch without rows: every replica needs at least one")
    sequences = batch.sequences
    lengths, masks = (
        sequences.lengths.cpu().view(-1, num_rows).amax(0),
        sequences.mask.cpu().unflatten(0, (-1, num_rows)),
    )
    lengths, order = torch.sort(lengths, descending=True, stable=True)
    num_slots = -(-num_rows // micro_batch)
    num_slots = -(-num_slots // slot_multiple) * slot_multiple
    sizes = [len(part) for part in torch.tensor_split(order, min(num_slots, num_rows))]
    num_idle = num_slots - len(sizes)
    cuts = [*pairwise(accumulate(sizes, initial=0)), *[(num_rows - 1, num_rows)] * num_idle]

    longest = lengths.tolist()
    widths = [padded_length(longest[start], length_multiple, device) for start, _ in cuts]
    positions = _positions(
        [
            resize(masks[:, order[start:stop]].flatten(0, 1), width)
            for (start, stop), width in zip(cuts, widths, strict=True)
        ],
        device,
    )
    ordered = batch.to(device).select(order)  # so that the slots are views of it
    slots = [
        _slot(ordered.block(start, stop), order[start:stop], where, width)
        for (start, stop), where, width in zip(cuts, positions, widths, strict=True)
    ]
    return [replace(slot, idle=i >= num_slots - num_idle) for i, slot in enumerate(slots)]


def _positions(masks: list[Tensor], device: torch.device) -> Sequence[Tensor | None]:
    """The response positions of each slot, in one copy to the device; none for rows of whole texts,
    which only a score reads."""
    if any(bool(mask[:, 0].any()) for mask in masks):
        return [None] * len(masks)
    found = [response_positions(mask) for mask in masks]
    return torch.cat(found).to(device).split([len(x) for x in found])


def _slot(rows: Rows, index: Tensor, positions: Tensor | None, width: int) -> MicroBatch:
    whole = rows.sequences
    trimmed = replace(whole, tokens=resize(whole.tokens, width), mask=resize(whole.mask, width))
    return MicroBatch(rows, index, trimmed, positions, whole.tokens.shape[1])


def resize(x: Tensor, width: int) -> Tensor:
    """[b, T, ...] cut or zero-padded to [b, width, ...]; for tensors that are zero (or padding)
    beyond both."""
    have = x.shape[1]
    if have == width:
        return x
    return (
        x[:, :width]
        if have > width
        else functional.pad(x, (0, 0) * (x.dim() - 2) + (0, width - have))
    )


def widen(output: Output, width: int) -> Output:
    """An output over trimmed sequences, as one over [b, width]."""
    if isinstance(output, TokenStats):
        return TokenStats(
            resize(output.logprobs, width),
            None if output.entropy is None else resize(output.entropy, width),
        )
    if isinstance(output, CriticOutput):
        return CriticOutput(resize(output.values, width), output.group_logits)
    return output


def tensors(output: Output) -> list[Tensor | None]:
    if isinstance(output, TokenStats):
        return [output.logprobs, output.entropy]
    if isinstance(output, CriticOutput):
        return [output.values, output.group_logits]
    return [output]


def rebuild(kind: type, parts: list[Any]) -> Output:
    """The inverse of `tensors`, for an output of type `kind`."""
    output: Output = parts[0] if kind is Tensor else kind(*parts)
    return output


def gather(slots: list[MicroBatch], outputs: list[Output]) -> Output:
    """Outputs of all slots, in the order of the batch's sequences."""
    kind = next(k for k in (TokenStats, CriticOutput, Tensor) if isinstance(outputs[0], k))
    columns = list(zip(*(tensors(o) for o in outputs), strict=True))
    return rebuild(
        kind, [None if column[0] is None else _in_order(slots, list(column)) for column in columns]
    )


def _in_order(slots: list[MicroBatch], parts: list[Tensor]) -> Tensor:
    # a pair's sequences: all chosen, then all rejected
    halves = len(parts[0]) // len(slots[0].index)
    busy = [
        (slot.index, part.unflatten(0, (halves, -1)))
        for slot, part in zip(slots, parts, strict=True)
        if not slot.idle
    ]
    place = torch.cat([index for index, _ in busy]).argsort()
    return torch.cat([part for _, part in busy], 1)[:, place.to(parts[0].device)].flatten(0, 1)
