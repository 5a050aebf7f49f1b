"""One model step with a KV cache, over the weights of mcore's GPTModel, under tensor and (virtual)
pipeline parallelism.

mcore's own inference loop caches keys before RoPE and rotates the whole cache again at every step;
here keys are rotated once.

    slots of the cache, three ragged prompts, after two steps        position of a token = its row's
    own count of tokens
      0 1 2 3 | 4 5 …                                                prompts are right-padded:
      causal attention needs no mask to
      a a a a | a a                                                  prefill, and responses start at
      one common slot;
      b b · · | b b                                                  decoding masks the padding (·)
      in between.
      c c c · | c c

Sequence parallelism shards activations of the training forward only: weights are whole per tensor
rank, and this file never shards rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import rope_frequencies
from gipo_megatron.megatron.param_sharding import unwrap
from gipo_megatron.specs import Architecture

# The local layer spec's name, then Transformer Engine's (its linear layers hold the norm before
# them).
_ATTENTION_NORM = ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
_MLP_NORM = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")

_FEW_ROWS = 128


@dataclass(frozen=True)
class LayerWeights:
    """This tensor rank's part of one layer: G key-value groups of Q query heads each, head width
    D."""

    attention_norm: Tensor  # [H]
    qkv: Tensor  # [G (Q + 2) D, H], one block of Q queries, key, value per group
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    proj: Tensor  # [H, G Q D]
    mlp_norm: Tensor  # [H]
    fc1: Tensor  # [2 F, H], gate above up
    fc2: Tensor  # [H, F]


def layer_weights(layer: nn.Module, architecture: Architecture) -> LayerWeights:
    """Views of a TransformerLayer's parameters, by either layer spec's names. Raises ValueError
    naming what is missing."""
    parameters = dict(layer.named_parameters())

    def read(*names: str) -> Tensor:
        for name in names:
            if name in parameters:
                return parameters[name].data
        raise ValueError(
            f"no parameter {' or '.join(names)} in a layer with {', '.join(sorted(parameters))}"
        )

    return LayerWeights(
        attention_norm=read(*_ATTENTION_NORM),
        qkv=read("self_attention.linear_qkv.weight"),
        qkv_bias=read("self_attention.linear_qkv.bias") if architecture.qkv_bias else None,
        q_norm=read("self_attention.q_layernorm.weight") if architecture.qk_norm else None,
        k_norm=read("self_attention.k_layernorm.weight") if architecture.qk_norm else None,
        proj=read("self_attention.linear_proj.weight"),
        mlp_norm=read(*_MLP_NORM),
        fc1=read("mlp.linear_fc1.weight"),
        fc2=read("mlp.linear_fc2.weight"),
    )


@dataclass
class Cache:
    """Keys (rotated) and values of this rank's layers, and which slots a row may look at."""

    keys: list[Tensor]  # per layer [B, G, S, D]
    values: list[Tensor]
    # [B, 1, 1, S] additive mask of the padding between prompt and response; None when prompts are
    # of one length
    bias: Tensor | None

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows (int64 [K] indices stay), layer by layer, so that only one layer is
        held twice."""
        for tensors in (self.keys, self.values):
            for i, x in enumerate(tensors):
                tensors[i] = x.index_select(0, rows)
        if self.bias is not None:
            self.bias = self.bias.index_select(0, rows)


class Decoder:
    """Prefill and decode steps of one replica; every one of its ranks makes the same calls.

    `chunks` are this stage's GPTModels in virtual-stage order, wrapped or not. Weights are read at
    construction: build one per generation. No sequence may grow beyond `positions`.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], architecture: Architecture, mesh: Mesh, positions: int
    ) -> None:
        self.architecture, self.mesh = architecture, mesh
        models = [unwrap(chunk) for chunk in chunks]
        self.layers = [
            [layer_weights(layer, architecture) for layer in model.decoder.layers]
            for model in models
        ]
        self.embedding = (
            models[0].embedding.word_embeddings.weight.data if mesh.is_first_stage else None
        )
        self.final_norm = (
            models[-1].decoder.final_layernorm.weight.data if mesh.is_last_stage else None
        )
        self.output = _output_weight(models[-1], architecture).data if mesh.is_last_stage else None
        self.dtype = self.layers[0][0].qkv.dtype
        self.num_groups = architecture.num_kv_heads // mesh.tensor_size
        self.rope = _rope_tables(architecture, positions, mesh.device, self.dtype)
        ranks, place = dist.get_process_group_ranks(mesh.pipeline_group), mesh.pipeline_rank
        self.previous, self.next = ranks[place - 1], ranks[(place + 1) % len(ranks)]

    def allocate(self, rows: int, slots: int, lengths: Tensor, width: int) -> Cache:
        """An empty cache; `width` is the prompts' padded length, `lengths` [rows] their true
        ones."""
        shape = (rows, self.num_groups, slots, self.architecture.head_dim)
        count = sum(len(chunk) for chunk in self.layers)
        keys, values = (
            [torch.empty(shape, dtype=self.dtype, device=self.mesh.device) for _ in range(count)]
            for _ in range(2)
        )
        bias = None
        if int(lengths.min()) < width:
            slot = torch.arange(slots, device=self.mesh.device)
            hidden = (slot >= lengths[:, None]) & (slot < width)
            bias = torch.zeros(
                hidden.shape, dtype=self.dtype, device=self.mesh.device
            ).masked_fill_(hidden, float("-inf"))[:, None, None]
        return Cache(keys, values, bias)

    def prefill(
        self, tokens: Tensor, lengths: Tensor, cache: Cache, first_row: int
    ) -> Tensor | None:
        """Right-padded prompts [b, P] into rows first_row … of the cache. Logits of each one's last
        token, as `step` returns them."""
        rows, width = slice(first_row, first_row + len(tokens)), tokens.shape[1]
        cos, sin = (table[:width, None, None] for table in self.rope)
        padding = torch.arange(width, device=tokens.device) >= lengths[:, None]
        bias = torch.zeros(padding.shape, dtype=self.dtype, device=tokens.device).masked_fill_(
            padding, float("-inf")
        )[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            cache.keys[layer][rows, :, :width] = k
            cache.values[layer][rows, :, :width] = v
            if q.shape[1] == 1:  # the last layer: only each prompt's last token is asked for
                return _attend_one(q[:, 0], k, v, bias).flatten(1)[:, None]
            q = q.flatten(2, 3).transpose(1, 2)
            return (
                F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
                )
                .transpose(1, 2)
                .flatten(2)
            )

        hidden = self._pipeline(tokens, cos, sin, attend, lengths - 1)
        return self._logits(hidden[:, 0]) if hidden is not None else None

    def step(self, tokens: Tensor, positions: Tensor, slot: int, cache: Cache) -> Tensor | None:
        """One token [b] a row, at its row's position [b], written to `slot`. Logits [b, V] on the
        last stage's tensor ranks, else None."""
        cos, sin = (table[positions][:, None, None, None] for table in self.rope)
        bias = cache.bias[..., : slot + 1] if cache.bias is not None else None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[:, :, slot], values[:, :, slot] = k[:, 0], v[:, 0]
            return _attend_one(
                q[:, 0], keys[:, :, : slot + 1], values[:, :, : slot + 1], bias
            ).flatten(1)[:, None]

        hidden = self._pipeline(tokens[:, None], cos, sin, attend, torch.zeros_like(tokens))
        return self._logits(hidden[:, 0]) if hidden is not None else None

    def _pipeline(
        self,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        wanted: Tensor,
    ) -> Tensor | None:
        """All layers over all stages and virtual stages; the last stage's hidden state [b, 1, H] at
        `wanted` [b], None elsewhere."""
        index, hidden, last = 0, None, len(self.layers) - 1
        for v, chunk in enumerate(self.layers):
            if self.mesh.is_first_stage and v == 0:
                hidden = self._embed(tokens)
            elif self.mesh.pipeline_size > 1:
                hidden = torch.empty(
                    *tokens.shape,
                    self.architecture.hidden_size,
                    dtype=self.dtype,
                    device=self.mesh.device,
                )
                dist.recv(hidden, src=self.previous, group=self.mesh.pipeline_group)
            assert hidden is not None
            ends = self.mesh.is_last_stage and v == last
            for place, weights in enumerate(chunk, 1):
                hidden = self._layer(
                    weights,
                    hidden,
                    cos,
                    sin,
                    index,
                    attend,
                    wanted if ends and place == len(chunk) else None,
                )
                index += 1
            if ends:
                return hidden
            if self.mesh.pipeline_size > 1:
                dist.send(hidden, dst=self.next, group=self.mesh.pipeline_group)
        return None

    def _layer(
        self,
        w: LayerWeights,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        index: int,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        wanted: Tensor | None,
    ) -> Tensor:
        """One layer [b, n, H]; with `wanted` [b], keys and values of all tokens, but output [b, 1,
        H] of those positions alone."""
        width, eps = self.architecture.head_dim, self.architecture.norm_eps
        qkv = _linear(rms_norm(x, w.attention_norm, eps), w.qkv, w.qkv_bias)
        qkv = qkv.view(*x.shape[:2], self.num_groups, -1, width)
        qk, v = qkv[..., :-1, :].contiguous(), qkv[..., -1, :]
        if w.q_norm is not None and w.k_norm is not None:
            qk = torch.cat(
                [
                    rms_norm(qk[..., :-1, :], w.q_norm, eps),
                    rms_norm(qk[..., -1:, :], w.k_norm, eps),
                ],
                dim=-2,
            )
        qk = torch.addcmul(qk * cos, qk.roll(width // 2, -1), sin)
        q = qk[..., :-1, :]
        if wanted is not None and x.shape[1] > 1:
            rows = torch.arange(len(x), device=x.device)
            q, x = q[rows, wanted][:, None], x[rows, wanted][:, None]
        attention = attend(index, q, qk[..., -1, :], v)
        x = x + self._sum(_linear(attention, w.proj))
        gate, up = _linear(rms_norm(x, w.mlp_norm, eps), w.fc1).chunk(2, -1)
        return x + self._sum(_linear(F.silu(gate).mul_(up), w.fc2))

    def _embed(self, tokens: Tensor) -> Tensor:
        assert self.embedding is not None
        if self.mesh.tensor_size == 1:
            return F.embedding(tokens, self.embedding)
        local = tokens - self.mesh.tensor_rank * len(self.embedding)
        mine = (local >= 0) & (local < len(self.embedding))
        return self._sum(F.embedding(torch.where(mine, local, 0), self.embedding) * mine[..., None])

    def _logits(self, hidden: Tensor) -> Tensor:
        """[b, H] -> [b, V] without Megatron's padding columns, gathered over the tensor ranks."""
        assert self.final_norm is not None and self.output is not None
        logits = _linear(rms_norm(hidden, self.final_norm, self.architecture.norm_eps), self.output)
        if self.mesh.tensor_size > 1:
            logits = logits.contiguous()
            parts = [torch.empty_like(logits) for _ in range(self.mesh.tensor_size)]
            dist.all_gather(parts, logits, group=self.mesh.tensor_group)
            logits = torch.cat(parts, dim=-1)
        return logits[:, : self.architecture.vocab_size]

    def _sum(self, x: Tensor) -> Tensor:
        if self.mesh.tensor_size > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self.mesh.tensor_group)
        return x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. For few rows a CPU's matrix product is 10 to 30 % faster on two threads as (W xᵀ)ᵀ,
    which splits W's rows over threads."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or rows > _FEW_ROWS or bias is not None:
        return F.linear(x, weight, bias)
    return torch.mm(weight, x.reshape(rows, -1).t()).t().view(*x.shape[:-1], -1)


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one new token: q [b, G, Q, D] over keys and values [b, G, S, D]; a group's
    queries share its keys without copying them.

    In fp32 two plain products are about twice as fast on a CPU as torch's fused kernel; in bf16 the
    fused kernel keeps scores in fp32.
    """
    if q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, keys.transpose(-1, -2))
    if bias is not None:
        scores += bias
    return torch.matmul(scores.softmax(-1), values)


def _output_weight(chunk: GPTModel, architecture: Architecture) -> Tensor:
    return (
        chunk.shared_embedding_or_output_weight()
        if architecture.tied_embeddings
        else chunk.output_layer.weight
    )


def _rope_tables(
    architecture: Architecture, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and signed sin [length, D], so that rope(x) = x · cos + roll(x, D / 2) · sin."""
    angles = torch.outer(
        torch.arange(length, device=device, dtype=torch.float32),
        rope_frequencies(architecture).to(device),
    )
    return torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat(
        [-angles.sin(), angles.sin()], -1
    ).to(dtype)
