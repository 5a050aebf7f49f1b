"""Log-probs, values and scores of each token from a model's raw output. The causal shift is in this
file and in no other.

position      0    1    2    3    4           the output at t-1 is for token t:
tokens       p0   p1   y0   y1  pad             logprobs[b, t] = log softmax(logits[b, t-1])[y_t]
mask          .    .    1    1    .             values[b, t]   = head(hidden[b, t-1])
model output o0   o1   o2   o3   o4           score[b]         = head(hidden[b, length-1]), no shift
used for y0 ______/    |
used for y1 ___________/
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gipo_megatron.megatron.heads import GroupHead
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.types import CriticOutput, Sequences, TokenStats

# Bytes of one fp32 copy of a row chunk's logits. On a CPU a chunk fits its caches. On a GPU small
# chunks would take longer to launch (about 50 kernels a chunk) than to compute.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}


def chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]


def response_positions(mask: Tensor) -> Tensor:
    """Return int64 [n], the places of the masked tokens in the flattened mask [b, T], which is on
    the host so that nothing waits for it."""
    assert not bool(mask[:, 0].any()), "the first token is inside the mask, but nothing predicts it"
    return mask.flatten().nonzero().squeeze(1)


def token_stats(
    logits: Tensor,
    sequences: Sequences,
    positions: Tensor,
    *,
    vocab_size: int,
    mesh: Mesh,
    temperature: float = 1.0,
    entropy: bool = False,
) -> TokenStats:
    """Return log-probs (and entropies, in nats) of softmax(logits / temperature) for the tokens
    inside the mask, zero elsewhere.

    `logits` [b, T, V' / tensor] is this rank's share of the padded vocabulary, whose columns from
    vocab_size on are ignored. `positions` are the `response_positions` of the mask, on the logits'
    device; no value is read back. Both results are fp32 [b, T], equal on every rank of the tensor
    group, and have gradients. An entropy that the loss does not use costs nothing in the backward
    pass. Only masked positions are read, in row chunks of CHUNK_BYTES, so no fp32 copy has the size
    of the logits. Collective: two small all-reduces per row chunk.
    """
    assert temperature > 0, "training samples at a temperature above 0"
    mask = sequences.mask
    assert mask.shape == logits.shape[:2], f"mask {mask.shape} and logits {logits.shape}"
    shard = _VocabShard(vocab_size, logits.shape[2], mesh)
    read = positions - 1  # the shift: flat position t-1 is in the same row, because t > 0
    tokens = sequences.tokens.flatten()[positions]
    logprobs, entropies = _TokenStats.apply(logits, read, tokens, shard, 1.0 / temperature, entropy)
    placed = _place(entropies, positions, mask) if entropy else None
    return TokenStats(_place(logprobs, positions, mask), placed)


def critic_output(
    raw: Tensor, hidden: Tensor, sequences: Sequences, group_head: GroupHead | None
) -> CriticOutput:
    """Return values [b, T] from the value head's raw output [b, T, 1], zero outside the mask, and
    group logits [b, M] from `hidden` [s, b, H]."""
    mask = sequences.mask
    values = torch.zeros(mask.shape, dtype=torch.float32, device=raw.device)
    values[:, 1:] = raw[:, :-1, 0]
    group_logits = None if group_head is None else group_head.logits(hidden, sequences)
    return CriticOutput(torch.where(mask, values, 0.0), group_logits)


def last_token_score(raw: Tensor, sequences: Sequences) -> Tensor:
    """Return [b]: the score head's raw output [b, T, 1] at each sequence's last real token."""
    rows = torch.arange(len(raw), device=raw.device)
    return raw[rows, sequences.lengths.to(raw.device) - 1, 0]


def _place(values: Tensor, position: Tensor, like: Tensor) -> Tensor:
    flat = torch.zeros(like.numel(), dtype=values.dtype, device=values.device)
    return flat.index_put((position,), values).view(like.shape)


class _VocabShard:
    """This rank's share of the vocabulary: columns first … first + width - 1 of all, then
    padding."""

    def __init__(self, vocab_size: int, columns: int, mesh: Mesh) -> None:
        self.first = mesh.tensor_rank * columns
        self.width = min(max(vocab_size - self.first, 0), columns)
        self.columns = columns
        self.group = mesh.tensor_group if mesh.tensor_size > 1 else None

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def rows_per_chunk(self, device: torch.device) -> int:
        return max(1, chunk_bytes(device) // (4 * self.columns))

    def targets(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (column of each token, clamped into this shard; whether it is in this shard)."""
        local = tokens - self.first
        return local.clamp(0, max(self.width - 1, 0)), (local >= 0) & (local < self.width)


class _TokenStats(torch.autograd.Function):
    """With x = logits / T over the real columns and z = Σ exp x:

    logp = x_y - log z,  H = log z - Σ p x,
    ∂logp/∂x = onehot_y - p,  ∂H/∂x = -p (log p + H).

    The backward pass has no collective: it keeps the logits and two numbers per row. It gets None
    as the gradient of an output that the loss does not use.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: Tensor,
        tokens: Tensor,
        shard: _VocabShard,
        scale: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        flat = logits.reshape(-1, shard.columns)
        logprobs, entropies, log_z = (
            torch.empty(len(rows), dtype=torch.float32, device=logits.device) for _ in range(3)
        )
        step = shard.rows_per_chunk(logits.device)
        for start in range(0, len(rows), step):
            cut = slice(start, start + step)
            x = flat[rows[cut]].float().mul_(scale)
            x[:, shard.width :] = -torch.inf
            top = shard.reduce(x.amax(1), dist.ReduceOp.MAX)
            x.sub_(top[:, None])
            column, inside = shard.targets(tokens[cut])
            target = torch.where(inside, x.gather(1, column[:, None]).squeeze(1), 0.0)
            weight = x.exp()
            weighted = torch.zeros_like(top)
            if entropy:
                x[:, shard.width :] = 0.0
                weighted = torch.linalg.vecdot(weight, x)
            sums = shard.reduce(torch.stack([weight.sum(1), weighted, target]), dist.ReduceOp.SUM)
            log_sum = sums[0].log()
            logprobs[cut] = sums[2] - log_sum
            entropies[cut] = log_sum - sums[1] / sums[0]
            log_z[cut] = top + log_sum
            del x, weight  # before the next chunk's are made
        ctx.save_for_backward(logits, rows, tokens, log_z, entropies)
        ctx.shard, ctx.scale = shard, scale
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, rows, tokens, log_z, entropies = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_z)
        shard: _VocabShard = ctx.shard
        flat = logits.reshape(-1, shard.columns)
        grad = torch.zeros_like(flat)
        step = shard.rows_per_chunk(logits.device)
        for start in range(0, len(rows), step):
            cut = slice(start, start + step)
            logp = flat[rows[cut]].float().mul_(ctx.scale).sub_(log_z[cut, None])
            logp[:, shard.width :] = 0.0
            p = logp.exp()
            p[:, shard.width :] = 0.0
            target = grad_logprobs[cut].float()
            factor = -target[:, None]
            if grad_entropies is not None:
                logp.add_(entropies[cut, None]).mul_(grad_entropies[cut, None])
                factor = logp.neg_().add_(factor)
            g = p.mul_(factor)
            del logp, factor
            column, inside = shard.targets(tokens[cut])
            g.scatter_add_(1, column[:, None], torch.where(inside, target, 0.0)[:, None])
            grad[rows[cut]] = g.mul_(ctx.scale).to(grad.dtype)
            del p, g
        return grad.view(logits.shape), None, None, None, None, None
