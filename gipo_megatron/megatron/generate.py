"""Responses to prompts, by one data parallel replica: the batch in slices that fit into memory,
each through the decode loop, and the rollout that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.decode import Decoder
from gipo_megatron.megatron.decode_loop import respond
from gipo_megatron.megatron.kv_budget import Need, Room, find_room
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.sampling import check_sampling
from gipo_megatron.rollouts import join
from gipo_megatron.specs import Architecture, Sampling
from gipo_megatron.types import Prompts, Rollout


def generate(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    prompts: Prompts,
    sampling: Sampling,
    end_ids: Sequence[int],
    pad_id: int,
    decode: Callable[[list[int]], str],
    *,
    room: Room | None = None,
) -> Rollout:
    """Draw one response per row of `prompts` [B, P], up to the first of `end_ids`. Collective over
    the replica's ranks, which all return the same Rollout.

    A row's tokens depend only on its prompt, the weights and (seed, step, sample_id): not on the
    layout, on other rows, or on `room`, the memory that a slice of the batch may fill (by default
    all that is free). generation_logprobs are of the distribution drawn from, after penalty
    and truncation. Raises UserError for sampling keys out of range, for sequences beyond
    the model's positions, and for logits that are not finite.
    """
    check_sampling(sampling)
    prompts = prompts.to(mesh.device)
    _check_lengths(prompts, sampling, architecture)
    shape = (len(prompts), sampling.max_response)
    responses = torch.full(shape, pad_id, device=mesh.device)
    counts = torch.zeros(len(prompts), dtype=torch.long, device=mesh.device)
    logprobs = torch.zeros(shape, device=mesh.device)
    ends = torch.tensor(end_ids, device=mesh.device)
    if len(prompts):
        longest = int(prompts.lengths.max())
        with torch.inference_mode():
            decoder = Decoder(chunks, architecture, mesh, longest + sampling.max_response)
            need = Need(architecture, mesh.parallel, decoder.dtype.itemsize)
            room = find_room(mesh, need, longest, sampling) if room is None else room
            for rows in _slices(prompts.lengths, sampling.max_response, need.token, room):
                responses[rows], counts[rows], logprobs[rows] = respond(
                    decoder, sampling, ends, prompts.select(rows)
                )
    return join(prompts, responses, counts, logprobs, end_ids, pad_id, decode)


def _check_lengths(prompts: Prompts, sampling: Sampling, architecture: Architecture) -> None:
    if not len(prompts):
        return
    if int(prompts.lengths.min()) < 1:
        empty = prompts.sample_id[prompts.lengths < 1].tolist()
        raise ValueError(f"empty prompts: samples {empty[:8]}")
    longest = int(prompts.lengths.max())
    if longest + sampling.max_response > architecture.max_positions:
        raise UserError(
            f"prompt of {longest} tokens + max_response {sampling.max_response} > the model's"
            f" {architecture.max_positions} positions",
            where="data.max_length, data.max_response",
            fix="lower data.max_length or data.max_response",
        )


def _slices(lengths: Tensor, max_response: int, token_bytes: int, room: Room) -> Iterator[Tensor]:
    """Yield row indices, longest prompts first, in slices that fit into `room` (one row at
    least)."""
    order, start = lengths.argsort(descending=True, stable=True), 0
    while start < len(order):
        stop = start + room.rows(int(lengths[order[start]]) + max_response, token_bytes)
        yield order[start:stop]
        start = stop
