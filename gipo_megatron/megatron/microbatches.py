"""Cutting a batch into micro-batches: similar lengths together, nothing wider than its longest sequence.

    rows          7 2 5 3 6          (lengths)         micro_batch 2
    micro-batches [7 6] [5 3] [2]    longest first: what does not fit in memory shows at once

A micro-batch keeps its rows whole ([b, T] as the caller knows them); only what the model reads is trimmed, and what the
model answers is padded back to T. So a loss never sees the trimming.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gipo_megatron.types import BatchLoss, CriticOutput, Output, Rows, Sequences, TokenStats

Readout = Callable[[Tensor, Sequences], Output]  # (what the last stage's chunk returned, the sequences it read) -> Output


@dataclass(frozen=True)
class MicroBatch:
    """One pipeline slot."""

    rows: Rows
    index: Tensor  # int64 [b], positions of `rows` in their batch
    sequences: Sequences  # trimmed
    width: int  # T of the rows
    loss: BatchLoss | None = None
    counts: dict[str, float] | None = None  # global units of this part's batch
    idle: bool = False  # fills a pipeline; counts for nothing


def plan(batch: Rows, micro_batch: int, *, length_multiple: int = 1, slot_multiple: int = 1) -> list[MicroBatch]:
    """Micro-batches of at most `micro_batch` rows, longest first.

    length_multiple: widths are rounded up to it (sequence parallelism).  slot_multiple: their number is a multiple of it
    (interleaved pipelines); rows are spread thinner first, then idle slots repeat one row.
    Raises ValueError for a batch without rows.
    """
    num_rows = len(batch)
    if num_rows == 0:
        raise ValueError("a batch without rows: every replica needs at least one")
    lengths = batch.sequences.lengths.view(-1, num_rows).amax(0).cpu()
    order = torch.sort(lengths, descending=True, stable=True).indices
    num_slots = -(-num_rows // micro_batch)
    num_slots = -(-num_slots // slot_multiple) * slot_multiple
    filled = [part for part in torch.tensor_split(order, min(num_slots, num_rows)) if len(part)]
    slots = [_slot(batch, index, length_multiple) for index in filled]
    return slots + [replace(_slot(batch, order[-1:], length_multiple), idle=True)] * (num_slots - len(slots))


def _slot(batch: Rows, index: Tensor, length_multiple: int) -> MicroBatch:
    rows = batch.select(index)
    sequences = rows.sequences
    longest = int(sequences.lengths.max())
    width = -(-longest // length_multiple) * length_multiple
    trimmed = replace(sequences, tokens=resize(sequences.tokens, width), mask=resize(sequences.mask, width))
    return MicroBatch(rows, index, trimmed, sequences.tokens.shape[1])


def resize(x: Tensor, width: int) -> Tensor:
    """[b, T, ...] cut or zero-padded to [b, width, ...]; for tensors that are zero (or padding) beyond both."""
    have = x.shape[1]
    if have == width:
        return x
    return x[:, :width] if have > width else functional.pad(x, (0, 0) * (x.dim() - 2) + (0, width - have))


def widen(output: Output, width: int) -> Output:
    """An output over trimmed sequences, as one over [b, width]."""
    if isinstance(output, TokenStats):
        return TokenStats(resize(output.logprobs, width), None if output.entropy is None else resize(output.entropy, width))
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


def gather(slots: list[MicroBatch], outputs: list[Output], num_rows: int) -> Output:
    """Outputs of all slots, in the order of the batch's sequences."""
    kind = next(k for k in (TokenStats, CriticOutput, Tensor) if isinstance(outputs[0], k))
    columns = list(zip(*(tensors(o) for o in outputs), strict=True))
    return rebuild(kind, [None if column[0] is None else _scatter(slots, list(column), num_rows) for column in columns])


def _scatter(slots: list[MicroBatch], parts: list[Tensor], num_rows: int) -> Tensor:
    halves = len(parts[0]) // len(slots[0].index)  # a pair's sequences: all chosen, then all rejected
    out = parts[0].new_zeros(halves, num_rows, *parts[0].shape[1:])
    for slot, part in zip(slots, parts, strict=True):
        if not slot.idle:
            out[:, slot.index.to(out.device)] = part.view(halves, len(slot.index), *part.shape[1:])
    return out.flatten(0, 1)
