"""Responses to prompts: the decode loop of one data parallel replica.

Every rank of the replica runs the same loop. The last stage's first tensor rank draws each token
and broadcasts it. Which rows have finished and when to stop follow from the tokens, so no other
message is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.decode import Cache, Decoder
from gipo_megatron.megatron.kv_budget import PREFILL_TOKENS, Need, Room, find_room
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.sampling import check_sampling, pick, uniforms
from gipo_megatron.specs import Architecture, Sampling
from gipo_megatron.types import Prompts, Rollout

# finished rows leave the cache when they are one in this many; the copy costs about one step
DROP_SHARE = 8


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
    all that is free). generation_logprobs are under softmax(logits / temperature), before
    truncation and penalty. Raises UserError for sampling keys out of range, for sequences beyond
    the model's positions, and for logits that are not finite.
    """
    check_sampling(sampling)
    prompts = prompts.to(mesh.device)
    _check_lengths(prompts, sampling, architecture)
    size = (len(prompts), sampling.max_response)
    responses = torch.full(size, pad_id, device=mesh.device)
    counts = torch.zeros(len(prompts), dtype=torch.long, device=mesh.device)
    logprobs = torch.zeros(size, device=mesh.device)
    ends = torch.tensor(end_ids, device=mesh.device)
    if len(prompts):
        longest = int(prompts.lengths.max())
        with torch.inference_mode():
            decoder = Decoder(chunks, architecture, mesh, longest + sampling.max_response)
            loop = _Loop(decoder, sampling, ends)
            need = Need(architecture, mesh.parallel, decoder.dtype.itemsize)
            room = find_room(mesh, need, longest, sampling) if room is None else room
            for rows in _slices(prompts.lengths, sampling.max_response, need.token, room):
                responses[rows], counts[rows], logprobs[rows] = loop.respond(prompts.select(rows))
    return _assemble(prompts, responses, counts, logprobs, ends, pad_id, decode)


@dataclass(frozen=True)
class _Loop:
    decoder: Decoder
    sampling: Sampling
    ends: Tensor

    def respond(self, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
        """Return response tokens [b, N], their number [b] and their log-probs [b, N], on every
        rank."""
        mesh, steps = self.decoder.mesh, self.sampling.max_response
        width = int(prompts.lengths.max())
        cache = self.decoder.allocate(len(prompts), width + steps - 1, prompts.lengths, width)
        logits = self._prefill(prompts.tokens[:, :width], prompts.lengths, cache)
        chooser = _Chooser(mesh, self.sampling, prompts, self.decoder.architecture.vocab_size)
        responses = torch.zeros(len(prompts), steps, dtype=torch.long, device=mesh.device)
        counts = torch.full((len(prompts),), steps, device=mesh.device)
        # the row of `prompts` in each row of the cache
        rows = torch.arange(len(prompts), device=mesh.device)
        finished = torch.zeros_like(rows, dtype=torch.bool)
        for t in range(steps):
            tokens = chooser.choose(logits, rows, t)
            responses[rows, t] = tokens
            ended = torch.isin(tokens, self.ends) & ~finished
            counts[rows[ended]] = t + 1
            finished |= ended
            num_finished = int(finished.sum())
            if num_finished == len(rows) or t == steps - 1:
                break
            if num_finished * DROP_SHARE >= len(rows):
                keep = (~finished).nonzero()[:, 0]
                cache.keep(keep)
                rows, tokens, finished = rows[keep], tokens[keep], finished[keep]
            logits = self.decoder.step(tokens, prompts.lengths[rows] + t, width + t, cache)
        return responses, counts, chooser.shared_logprobs()

    def _prefill(self, tokens: Tensor, lengths: Tensor, cache: Cache) -> Tensor | None:
        block = max(1, PREFILL_TOKENS // tokens.shape[1])
        parts = [
            self.decoder.prefill(tokens[i : i + block], lengths[i : i + block], cache, i)
            for i in range(0, len(tokens), block)
        ]
        done = [part for part in parts if part is not None]
        return torch.cat(done) if done else None


class _Chooser:
    """Draws tokens on one rank and broadcasts them to the others."""

    def __init__(self, mesh: Mesh, sampling: Sampling, prompts: Prompts, vocab_size: int) -> None:
        self.mesh, self.sampling, self.sample_id = mesh, sampling, prompts.sample_id
        self.source = dist.get_process_group_ranks(mesh.model_group)[-mesh.tensor_size]
        self.draws = mesh.rank == self.source
        self.logprobs = torch.zeros(len(prompts), sampling.max_response, device=mesh.device)
        self.seen: Tensor | None = None
        if self.draws:
            self.noise = uniforms(sampling, prompts.sample_id).to(mesh.device)
            if sampling.repetition_penalty != 1:
                self.seen = _seen(prompts, vocab_size)

    def choose(self, logits: Tensor | None, rows: Tensor, t: int) -> Tensor:
        """Return token number t of `rows` [k]. The drawing rank has their logits [k, V]."""
        if self.draws:
            assert logits is not None
            seen = self.seen[rows] if self.seen is not None else None
            tokens, self.logprobs[rows, t] = pick(logits, self.sampling, self.noise[rows, t], seen)
            if self.seen is not None:
                self.seen[rows, tokens.clamp(min=0)] = True
        else:
            tokens = torch.empty_like(rows)
        if self.mesh.parallel.model > 1:
            dist.broadcast(tokens, src=self.source, group=self.mesh.model_group)
        if int(tokens.min()) < 0:
            samples = self.sample_id[rows[tokens < 0]].tolist()
            raise UserError(
                f"generation: the model's logits are not finite for samples {samples[:8]} at"
                f" response token {t}",
                fix="the weights are damaged: start again from an earlier checkpoint, with a lower"
                " learning rate",
            )
        return tokens

    def shared_logprobs(self) -> Tensor:
        if self.mesh.parallel.model > 1:
            dist.broadcast(self.logprobs, src=self.source, group=self.mesh.model_group)
        return self.logprobs


def _seen(prompts: Prompts, vocab_size: int) -> Tensor:
    """Return bool [B, V]: which tokens are in each prompt."""
    tokens = prompts.tokens
    padding = torch.arange(tokens.shape[1], device=tokens.device) >= prompts.lengths[:, None]
    seen = torch.zeros(len(prompts), vocab_size + 1, dtype=torch.bool, device=tokens.device)
    return seen.scatter_(1, tokens.masked_fill(padding, vocab_size), True)[:, :vocab_size]


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


def _assemble(
    prompts: Prompts,
    responses: Tensor,
    counts: Tensor,
    logprobs: Tensor,
    ends: Tensor,
    pad_id: int,
    decode: Callable[[list[int]], str],
) -> Rollout:
    """Join prompts and responses, right-padded to the longest row."""
    lengths = prompts.lengths
    total = int((lengths + counts).max()) if len(prompts) else 0
    position = torch.arange(total, device=lengths.device).expand(len(prompts), -1)
    index = position - lengths[:, None]
    mask = (index >= 0) & (index < counts[:, None])
    index = index.clamp(0, responses.shape[1] - 1)
    prompt = prompts.tokens.gather(1, position.clamp(max=prompts.tokens.shape[1] - 1))
    prompt = prompt.masked_fill(position >= lengths[:, None], pad_id)
    tokens = torch.where(mask, responses.gather(1, index), prompt)
    last = responses.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    finished = torch.isin(last, ends)
    rows = zip(responses.tolist(), (counts - finished.long()).tolist(), strict=True)
    texts = [decode(row[:count]) for row, count in rows]  # without the end token
    return Rollout(
        tokens=tokens,
        mask=mask,
        prompt_lengths=lengths,
        finished=finished,
        generation_logprobs=torch.where(mask, logprobs.gather(1, index), 0.0),
        response_text=tuple(texts),
        prompt_id=prompts.prompt_id,
        sample_id=prompts.sample_id,
        source=prompts.source,
        extras=prompts.extras,
    )
