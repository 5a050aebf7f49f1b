"""Log-probs, values and scores of each token from a model's last hidden states. The causal shift is
in this file and in no other.

position      0    1    2    3    4           the output at t-1 is for token t:
tokens       p0   p1   y0   y1  pad             logprobs[b, t] = log softmax(W hidden[b, t-1])[y_t]
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

# Bytes of one fp32 block of logits. On a CPU a block fits its caches. On a GPU small blocks would
# take longer to launch (about 30 kernels a block) than to compute.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
# Columns of a block are a multiple of this. The narrowest block has the size of the hidden states
# of a small model.
BLOCK_COLUMNS = 64
LOWEST = -1e30  # below any logit, and finite: a difference of two is no NaN


def block_columns(rows: int, device: torch.device) -> int:
    """Return the number of logits of each row in a block of `rows` rows."""
    size = BLOCK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    return max(1, size // (4 * max(rows, 1) * BLOCK_COLUMNS)) * BLOCK_COLUMNS


def response_positions(mask: Tensor) -> Tensor:
    """Return int64 [n], the places of the masked tokens in the flattened mask [b, T], which is on
    the host so that nothing waits for it."""
    assert not bool(mask[:, 0].any()), "the first token is inside the mask, but nothing predicts it"
    return mask.flatten().nonzero().squeeze(1)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    sequences: Sequences,
    positions: Tensor,
    *,
    vocab_size: int,
    mesh: Mesh,
    temperature: float = 1.0,
    entropy: bool = False,
) -> TokenStats:
    """Return log-probs (and entropies, in nats) of softmax(W hidden / temperature) for the tokens
    inside the mask, zero elsewhere.

    `hidden` [b, T, H] is the output of a LanguageHead, `weight` [V' / tensor, H] this rank's share
    of the padded vocabulary, whose rows from vocab_size on are ignored. `positions` are the
    `response_positions` of the mask, on the device of `hidden`; no value is read back. Both results
    are fp32 [b, T], equal on every rank of the tensor group, and have gradients. An entropy that
    the loss does not use costs nothing in the backward pass.

    Logits exist for masked positions only, and of these in blocks of BLOCK_BYTES, which the
    backward pass computes again. Collective: two small all-reduces, and one of the read positions'
    gradient.
    """
    assert temperature > 0, "training samples at a temperature above 0"
    mask = sequences.mask
    assert mask.shape == hidden.shape[:2], f"mask {mask.shape} and hidden states {hidden.shape}"
    shard = _VocabShard(vocab_size, len(weight), mesh)
    read = positions - 1  # the shift: flat position t-1 is in the same row, because t > 0
    tokens = sequences.tokens.flatten()[positions] - shard.first
    logprobs, entropies = _TokenStats.apply(
        hidden, weight, read, tokens, shard, 1.0 / temperature, entropy
    )
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
        self.group = mesh.tensor_group if mesh.tensor_size > 1 else None

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def blocks(self, rows: Tensor) -> list[slice]:
        """Return the columns of each block of logits of `rows` [n, H]."""
        step = block_columns(len(rows), rows.device)
        return [slice(i, min(i + step, self.width)) for i in range(0, self.width, step)]


class _TokenStats(torch.autograd.Function):
    """With x = W h / T over the real columns, m = max x and z = Σ exp x:

    logp = x_y - log z,  H = log z - Σ p x,
    ∂logp/∂x = onehot_y - p,  ∂H/∂x = -p (log p + H).

    Both passes go through the vocabulary in blocks of columns, of all rows h at once. Forward:
    `sums` are Σ e^(x-m), Σ e^(x-m) (x-m) and x_y, and a block with a larger m rescales the first
    two. Backward: x again, from h, W and log z, except where one block is all, which is kept. A
    block's part of W's gradient is final; h's is summed over the blocks in fp32, then over the
    tensor group. The gradient of an output that the loss does not use is None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        read: Tensor,
        tokens: Tensor,
        shard: _VocabShard,
        scale: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.flatten(0, 1)[read]
        top = torch.full((len(rows),), LOWEST, device=rows.device)
        sums = top.new_zeros(3, len(rows))
        blocks, kept = shard.blocks(rows), None
        for block in blocks:
            x = _logits(rows, weight[block], scale)
            column, inside = _target(tokens, block)
            sums[2] += torch.where(inside, x.gather(1, column[:, None]).squeeze(1), 0.0)
            highest = torch.maximum(top, x.amax(1))
            _rescale(sums, top - highest)
            top = highest
            x.sub_(top[:, None])
            kept = x if len(blocks) == 1 else None
            power = x.exp() if entropy or kept is not None else x.exp_()
            sums[0] += power.sum(1)
            if entropy:
                sums[1] += power.mul_(x).sum(1)
            del x, power  # before the next block's are made
        highest = shard.reduce(top.clone(), dist.ReduceOp.MAX)
        _rescale(sums, top - highest)
        shard.reduce(sums, dist.ReduceOp.SUM)
        log_sum = sums[0].log()
        entropies, log_z = log_sum - sums[1] / sums[0], highest + log_sum
        ctx.save_for_backward(rows, weight, read, tokens, log_z, entropies, kept, top)
        ctx.shard, ctx.scale, ctx.shape = shard, scale, hidden.shape
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return sums[2] - highest - log_sum, entropies

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows, weight, read, tokens, log_z, entropies, kept, top = ctx.saved_tensors
        shard: _VocabShard = ctx.shard
        target = torch.zeros_like(log_z) if grad_logprobs is None else grad_logprobs * ctx.scale
        grad_rows = torch.zeros_like(rows, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            grad_weight[shard.width :] = 0.0
        for block in shard.blocks(rows):
            if kept is None:
                logp = _logits(rows, weight[block], ctx.scale).sub_(log_z[:, None])
            else:
                logp = kept + (top - log_z)[:, None]
            if grad_entropies is None:
                g = logp.exp_().mul_(-target[:, None])
            else:
                p = logp.exp()
                spread = (grad_entropies * -ctx.scale)[:, None]
                g = logp.add_(entropies[:, None]).mul_(spread).sub_(target[:, None]).mul_(p)
                del p
            column, inside = _target(tokens, block)
            g.scatter_add_(1, column[:, None], torch.where(inside, target, 0.0)[:, None])
            g = g.to(rows.dtype)
            del logp
            if grad_weight is not None:
                torch.mm(g.t(), rows, out=grad_weight[block])
            _add_product(grad_rows, g, weight[block])
            del g
        grad = rows.new_zeros(ctx.shape)
        whole = shard.reduce(grad_rows.to(rows.dtype), dist.ReduceOp.SUM)
        grad.view(-1, rows.shape[1])[read] = whole
        return grad, grad_weight, None, None, None, None, None


def _logits(rows: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Return fp32 logits · scale [n, columns], the product itself in the model's dtype."""
    x = torch.mm(rows, weight.t()).float()
    return x if scale == 1.0 else x.mul_(scale)


def _target(tokens: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return (column of each token, clamped into this block; whether it is in this block)."""
    column, last = tokens - block.start, block.stop - block.start - 1
    return column.clamp(0, last), (column >= 0) & (column <= last)


def _rescale(sums: Tensor, by: Tensor) -> None:
    """Move the maximum in the sums [2 or more, n] of `_TokenStats`: x - m becomes x - m + by."""
    sums[1] += by * sums[0]
    sums[:2] *= by.exp()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to the fp32 total, in place where a and b are fp32, too."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total.add_(a @ b)
