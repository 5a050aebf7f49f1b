"""The decode loop: one step function over static tensors, which a GPU replays as a CUDA graph.

    rows at two reads, · has ended
      a b c d e f g h     a step runs on a number of rows that leaves room for ended ones
      a · c · e · · h     so few are left that the next smaller number holds them
      a h c e             h and e move into the gaps; steps run on the first four rows

Shapes are (rows, slots), from few values each, and addresses never change. The host does not wait
for the device within a step: ended rows go on, and their tokens are dropped. Every few tokens the
host reads which rows have ended.

All ranks of a replica run the same loop. The last stage's first tensor rank draws each token and
broadcasts it. All else follows from the tokens, so no other message is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.decode import Decoder
from gipo_megatron.megatron.kv_budget import PREFILL_TOKENS
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.sampling import pick, uniforms
from gipo_megatron.specs import Sampling
from gipo_megatron.types import Prompts


@dataclass(frozen=True)
class Pace:
    """The number of tokens between two reads of the device, and the edges of a step's shapes."""

    read: int  # tokens from one read to the next
    slots: int  # attention covers a multiple of so many slots
    shrink: float  # rows move together when no more than this share is left


# a read on a CPU is free and time grows with the rows; a GPU waits for a read, reads its weights
# for any number of rows, and needs a graph per shape
PACES = {"cpu": Pace(1, 8, 7 / 8), "cuda": Pace(16, 256, 1 / 2)}


def respond(
    decoder: Decoder, sampling: Sampling, ends: Tensor, prompts: Prompts
) -> tuple[Tensor, Tensor, Tensor]:
    """Return response tokens [B, N] to prompts (longest first), their number [B] up to the first of
    `ends`, and their log-probs [B, N], on every rank. Raises UserError for logits that are not
    finite."""
    loop, lengths = Loop(decoder, sampling, ends, prompts), prompts.lengths.tolist()
    pace, steps = PACES[decoder.mesh.device.type], sampling.max_response
    run = Graphs(decoder.mesh)
    loop.accept(loop.prefill(lengths), len(lengths))
    held = list(range(len(lengths)))  # the prompt in each row
    for t in range(1, steps):
        if (t - 1) % pace.read == 0:
            held, living = loop.settle(held, pace.shrink)
            if not held:
                break
            longest = max(lengths[prompt] for prompt in living)
        slots = min(-(-(longest + t) // pace.slots) * pace.slots, len(loop.cache.slots))
        run(loop.step, len(held), slots)
    return loop.results()


class Graphs:
    """Calls of a step, by shape: the first is eager and lets libraries set themselves up, later
    ones replay a CUDA graph of it. All are eager on a CPU, and where a step has messages.

    Graphs hold the addresses of weights and buffers, so they are as short-lived as the buffers.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.on = mesh.device.type == "cuda" and mesh.parallel.model == 1
        self.pool = torch.cuda.graph_pool_handle() if self.on else None
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    def __call__(self, step: Callable[[int, int], None], rows: int, slots: int) -> None:
        shape = rows, slots
        if not self.on or shape not in self.graphs:
            self.graphs[shape] = None
            step(rows, slots)
            return
        graph = self.graphs[shape]
        if graph is None:
            graph = self.graphs[shape] = capture(lambda: step(rows, slots), self.pool)
        graph.replay()


def capture(call: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Record the kernels of `call`. Its temporaries come from `pool`, which graphs that replay one
    after the other share. Other threads (NCCL's) may go on meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        call()
    return graph


class Loop:
    """The tensors of one slice of B prompts, N response tokens each, and what a step does."""

    def __init__(
        self, decoder: Decoder, sampling: Sampling, ends: Tensor, prompts: Prompts
    ) -> None:
        self.decoder, self.sampling, self.ends, self.prompts = decoder, sampling, ends, prompts
        self.mesh, device = decoder.mesh, decoder.mesh.device
        self.source = dist.get_process_group_ranks(self.mesh.model_group)[-self.mesh.tensor_size]
        self.draws = self.mesh.rank == self.source
        shape = (len(prompts), sampling.max_response)
        # the last token has no slot: nothing follows it
        self.cache = decoder.allocate(len(prompts), int(prompts.lengths.max()) + shape[1] - 1)
        # by row of the cache
        self.prompt = torch.arange(len(prompts), device=device)
        self.tokens = torch.zeros_like(self.prompt)  # the last ones; -1: logits were not finite
        self.positions = prompts.lengths - 1  # theirs
        self.ended = torch.zeros_like(self.prompt, dtype=torch.bool)
        # by prompt
        self.responses = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.noise = uniforms(sampling, prompts.sample_id).to(device)
        self.seen: Tensor | None = None
        if self.draws and sampling.repetition_penalty != 1:
            self.seen = _seen(prompts, decoder.architecture.vocab_size)
        self.time = torch.zeros(1, dtype=torch.long, device=device)  # response tokens so far

    def prefill(self, lengths: list[int]) -> Tensor | None:
        """Write the prompts into the cache, in blocks of their own width. Returns the logits of the
        first response tokens, as `Decoder.step` does."""
        parts, start, block = [], 0, PREFILL_TOKENS[self.mesh.device.type]
        while start < len(lengths):
            rows = slice(start, start + max(1, block // lengths[start]))
            tokens = self.prompts.tokens[rows, : lengths[start]]
            parts.append(
                self.decoder.prefill(tokens, self.prompts.lengths[rows], self.cache, start)
            )
            start += len(tokens)
        done = [part for part in parts if part is not None]
        return torch.cat(done) if done else None

    def step(self, rows: int, slots: int) -> None:
        """Draw one token more for the first `rows` rows, which fill less than `slots` slots."""
        tokens, positions = self.tokens[:rows].clamp(min=0), self.positions[:rows]
        self.accept(self.decoder.step(tokens, positions, self.cache, slots), rows)

    def accept(self, logits: Tensor | None, rows: int) -> None:
        """Draw the next token of the first `rows` rows. Rows that have ended keep their last."""
        prompt, ended = self.prompt[:rows], self.ended[:rows]
        if self.draws:
            assert logits is not None
            seen = self.seen[prompt] if self.seen is not None else None
            noise = self.noise[prompt, self.time]
            drawn, self.logprobs[prompt, self.time] = pick(logits, self.sampling, noise, seen)
            if self.seen is not None:
                self.seen[prompt, drawn.clamp(min=0)] = torch.ones_like(ended)
        else:
            drawn = torch.empty_like(prompt)
        if self.mesh.parallel.model > 1:
            dist.broadcast(drawn, src=self.source, group=self.mesh.model_group)
        tokens = torch.where(ended, self.tokens[:rows], drawn)
        self.tokens[:rows] = tokens
        self.responses[prompt, self.time] = tokens
        ended |= self._ends(tokens) | (tokens < 0)
        self.positions[:rows] += 1
        self.time += 1

    def _ends(self, tokens: Tensor) -> Tensor:
        """Return where tokens [...] are end tokens. torch.isin may sort, and wait for a GPU."""
        return (tokens[..., None] == self.ends).any(-1)

    def settle(self, held: list[int], shrink: float) -> tuple[list[int], list[int]]:
        """Read which rows have ended. Where few are left, move them to the first rows. Returns the
        prompts in the rows that go on, and of these the prompts that have not ended."""
        tokens, ended = (x[: len(held)].tolist() for x in (self.tokens, self.ended))
        if min(tokens) < 0:
            raise self._not_finite()
        living = [row for row, over in enumerate(ended) if not over]
        rows = _fewer(len(held), len(living), shrink)
        movers = [row for row in living if row >= rows]
        gaps = [row for row in range(rows) if ended[row]][: len(movers)]
        prompts, held = [held[row] for row in living], held.copy()
        if movers:
            self._move(movers, gaps)
            for mover, gap in zip(movers, gaps, strict=True):
                held[gap] = held[mover]
        return held[:rows], prompts

    def _move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows, one tensor of the cache after the other, so that one is held twice at most."""
        source, target = (torch.tensor(x, device=self.mesh.device) for x in (sources, targets))
        by_row = (self.prompt, self.tokens, self.positions, self.ended)
        for x in (*self.cache.keys, *self.cache.values, *by_row):
            x[target] = x[source]

    def _not_finite(self) -> UserError:
        """Return the error of the first token with logits that are not finite."""
        at, prompts = (self.responses < 0).nonzero().unbind(1)[::-1]
        samples = self.prompts.sample_id[prompts[at == at.min()]].tolist()
        return UserError(
            f"generation: the model's logits are not finite for samples {samples[:8]} at"
            f" response token {int(at.min())}",
            fix="the weights are damaged: start again from an earlier checkpoint, with a lower"
            " learning rate",
        )

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, their number and log-probs. What follows an end is left over."""
        if int(self.responses.min()) < 0:
            raise self._not_finite()
        if self.mesh.parallel.model > 1:
            dist.broadcast(self.logprobs, src=self.source, group=self.mesh.model_group)
        ends, steps = self._ends(self.responses), self.responses.shape[1]
        counts = torch.where(ends.any(1), ends.int().argmax(1) + 1, steps)
        return self.responses, counts, self.logprobs


def _fewer(rows: int, living: int, shrink: float) -> int:
    """Return the least of rows, rows · shrink, rows · shrink² …, each rounded down, that holds
    `living`."""
    while living <= int(rows * shrink) < rows:
        rows = int(rows * shrink)
    return rows


def _seen(prompts: Prompts, vocab_size: int) -> Tensor:
    """Return bool [B, V]: which tokens are in each prompt."""
    tokens = prompts.tokens
    padding = torch.arange(tokens.shape[1], device=tokens.device) >= prompts.lengths[:, None]
    seen = torch.zeros(len(prompts), vocab_size + 1, dtype=torch.bool, device=tokens.device)
    return seen.scatter_(1, tokens.masked_fill(padding, vocab_size), True)[:, :vocab_size]
