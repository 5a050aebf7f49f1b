"""Micro-batches of a batch: similar lengths together, each as wide as its longest sequence.

    rows (lengths)   9 3 5 3 9 3
    micro_batch 3    [9 9 5] [3 3 3]     at most 3 rows
    micro_tokens 20  [9 9] [5 3 3 3]     rows × width is at most 20

Longest first: if one does not fit in memory, it is the first. A micro-batch keeps its rows whole,
[b, T] as in the batch. Only the model's input is trimmed, and the model's output is padded back to
T, so losses do not depend on the trimming.

All sizes are computed on the host, before the batch goes to the device, so that no later step waits
for one.
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
# What a micro-batch costs beside its tokens (launches, reading weights, adding gradients), in
# tokens. With it the padding of dialogues of some hundred tokens stays below 5 %.
OVERHEAD = 64


@dataclass(frozen=True)
class MicroBatch:
    """One pipeline slot."""

    rows: Rows
    index: Tensor  # int64 [b] on the host, places of `rows` in their batch
    sequences: Sequences  # trimmed
    # int64 [n], outputs.response_positions of the trimmed mask; None where a first token is masked
    positions: Tensor | None
    width: int  # T of the rows
    real: int  # tokens of `sequences` that are not padding; 0 of an idle slot
    loss: BatchLoss | None = None
    counts: dict[str, float] | None = None  # global units of this part's batch
    idle: bool = False  # fills a pipeline; its outputs are dropped


# (output of the last stage's chunk, its slot) -> Output
Readout = Callable[[Tensor, MicroBatch], Output]


def padded_length(longest: int, length_multiple: int, device: torch.device) -> int:
    """Round `longest` up to `length_multiple`; on a GPU also to 64 tokens, and above 512 to 128.

    On a GPU each new shape takes time (plans of fused attention, compiled kernels, blocks of the
    allocator), so there should be few. The width may exceed the model's positions: RoPE is computed
    for any width, and no real token attends to the padding after it.
    """
    if device.type != "cpu":
        length_multiple = math.lcm(length_multiple, 64 if longest <= 512 else 128)
    return -(-longest // length_multiple) * length_multiple


def plan(
    batch: Rows,
    micro_batch: int | None,
    device: torch.device = HOST,
    *,
    micro_tokens: int | None = None,
    length_multiple: int = 1,
    slot_multiple: int = 1,
    least_slots: int = 1,
) -> list[MicroBatch]:
    """Cut into micro-batches of at most `micro_batch` rows, or of at most `micro_tokens` tokens, on
    `device`, longest first. Padding counts; a row that is longer than the budget is alone.

    Widths are multiples of length_multiple (for sequence parallelism). The number of slots is a
    multiple of slot_multiple (for interleaved pipelines) and at least least_slots: rows are spread
    thinner first, then idle slots repeat one row. Raises ValueError for a batch without rows.
    """
    num_rows = len(batch)
    if num_rows == 0:
        raise ValueError("a batch without rows: every replica needs at least one")
    lengths = batch.sequences.lengths.cpu().view(-1, num_rows)
    masks = batch.sequences.mask.cpu().unflatten(0, (-1, num_rows))
    longest, order = torch.sort(lengths.amax(0), descending=True, stable=True)
    widths = [padded_length(n, length_multiple, device) for n in longest.tolist()]
    if micro_batch is not None:
        filled, fewest = [], -(-num_rows // micro_batch)
    else:
        assert micro_tokens is not None, "neither micro_batch nor micro_tokens is set"
        filled = _cheapest(widths, micro_tokens // len(lengths))
        fewest = len(filled)
    num_slots = -(-max(fewest, least_slots) // slot_multiple) * slot_multiple
    busy = min(num_slots, num_rows)
    even = [len(part) for part in torch.tensor_split(order, busy)]
    sizes = _thinner(filled, busy) if filled else even
    idle = [(num_rows - 1, num_rows)] * (num_slots - busy)
    cuts = [*pairwise(accumulate(sizes, initial=0)), *idle]
    trimmed = [resize(masks[:, order[i:j]].flatten(0, 1), widths[i]) for i, j in cuts]
    positions = _positions(trimmed, device)
    ordered = batch.to(device).select(order)  # so that the slots are views of it
    slots = [
        _slot(ordered.block(i, j), order[i:j], where, widths[i], int(lengths[:, order[i:j]].sum()))
        for (i, j), where in zip(cuts, positions, strict=True)
    ]
    return [*slots[:busy], *(replace(slot, idle=True, real=0) for slot in slots[busy:])]


def _cheapest(widths: list[int], budget: int) -> list[int]:
    """Return the sizes of micro-batches with the least sum of rows × width + OVERHEAD, where rows ×
    width is at most `budget`, or rows is 1. `widths` are those of the rows alone, widest first.

    Dynamic programming: the last micro-batch of the first `stop` rows begins at some `start`, and
    the rows before it are cut the best way.
    """
    best: list[tuple[int, list[int]]] = [(0, [])]  # of the first 0, 1, 2, … rows
    for stop in range(1, len(widths) + 1):
        options: list[tuple[int, int]] = []
        for start in range(stop - 1, -1, -1):
            tokens = (stop - start) * widths[start]
            if options and tokens > budget:
                break
            options.append((best[start][0] + tokens + OVERHEAD, start))
        cost, start = min(options)
        best.append((cost, [*best[start][1], stop - start]))
    return best[-1][1]


def _thinner(sizes: list[int], count: int) -> list[int]:
    """Return at least `count` sizes: the largest is halved until there are as many."""
    while len(sizes) < count:
        at = sizes.index(max(sizes))
        sizes = [*sizes[:at], -(-sizes[at] // 2), sizes[at] // 2, *sizes[at + 1 :]]
    return sizes


def _positions(masks: list[Tensor], device: torch.device) -> Sequence[Tensor | None]:
    """Return the response positions of each slot, copied to the device at once; None for rows of
    whole texts, which only get a score."""
    if any(bool(mask[:, 0].any()) for mask in masks):
        return [None] * len(masks)
    found = [response_positions(mask) for mask in masks]
    return torch.cat(found).to(device).split([len(x) for x in found])


def _slot(rows: Rows, index: Tensor, positions: Tensor | None, width: int, real: int) -> MicroBatch:
    whole = rows.sequences
    trimmed = replace(whole, tokens=resize(whole.tokens, width), mask=resize(whole.mask, width))
    return MicroBatch(rows, index, trimmed, positions, whole.tokens.shape[1], real)


def resize(x: Tensor, width: int) -> Tensor:
    """Cut or zero-pad [b, T, ...] to [b, width, ...], for tensors that are zero (or padding) beyond
    both."""
    if x.shape[1] >= width:
        return x[:, :width]
    return functional.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]))


def widen(output: Output, width: int) -> Output:
    """Pad an output over trimmed sequences to [b, width]."""
    if isinstance(output, TokenStats):
        entropy = None if output.entropy is None else resize(output.entropy, width)
        return TokenStats(resize(output.logprobs, width), entropy)
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
    """Return an output of type `kind` from the result of `tensors`."""
    output: Output = parts[0] if kind is Tensor else kind(*parts)
    return output


def gather(slots: list[MicroBatch], outputs: list[Output]) -> Output:
    """Join the outputs of all slots, in the order of the batch's sequences."""
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
