"""One model step with a KV cache, on the weights of mcore's GPTModel, under tensor and (virtual)
pipeline parallelism.

mcore's own inference caches keys before RoPE and rotates the whole cache at every step. Here keys
are rotated once.

    slots of the cache for three ragged prompts, after two steps
      0 1 2 3 4 5 │ 6 7
      a a a a A A │ · ·    A token's slot is its position in its row. Prompts are right-padded, so
      b b B B · · │ · ·    causal attention needs no mask in prefill. A step writes one token per
      c c c C C · │ · ·    row and reads the slots before the bar, of which it masks the rest (·).

Sequence parallelism shards activations in the training forward pass only. Weights are whole per
tensor rank, and this file never shards rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gipo_megatron.megatron.fusions import rope_angles
from gipo_megatron.megatron.heads import output_weight
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import rope_frequencies
from gipo_megatron.megatron.param_sharding import unwrap
from gipo_megatron.specs import Architecture

# names in the local layer spec, then Transformer Engine's, whose linear layers hold their norm
_ATTENTION_NORM = ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
_MLP_NORM = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")

_FEW_ROWS = 128
# (index of the layer, queries, keys, values) -> attention output
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """W x + b + B A x. Of a weight whose columns are cut, a tensor rank's part of the sum over the
    ranks."""

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None  # of an adapter
    b: Tensor | None = None  # times its factor

    def __call__(self, x: Tensor) -> Tensor:
        out = _linear(x, self.weight, self.bias)
        if self.a is None or self.b is None:
            return out
        return out + _linear(_linear(x, self.a), self.b)


@dataclass(frozen=True)
class LayerWeights:
    """A tensor rank's part of one layer: G key-value groups of Q query heads each, head width D."""

    attention_norm: Tensor  # [H]
    qkv: Linear  # [G (Q + 2) D, H], one block of Q queries, key, value per group
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    proj: Linear  # [H, G Q D]
    mlp_norm: Tensor  # [H]
    fc1: Linear  # [2 F, H], gate above up
    fc2: Linear  # [H, F]


def layer_weights(layer: nn.Module, architecture: Architecture) -> LayerWeights:
    """Return views of a TransformerLayer's parameters, by the names of either layer spec. Raises
    ValueError with the missing name."""
    parameters = dict(layer.named_parameters())

    def read(*names: str) -> Tensor:
        for name in names:
            if name in parameters:
                return parameters[name].data
        known = ", ".join(sorted(parameters))
        raise ValueError(f"no parameter {' or '.join(names)} in a layer with {known}")

    def linear(name: str, bias: bool = False) -> Linear:
        weights = read(f"{name}.weight"), read(f"{name}.bias") if bias else None
        adapter = getattr(layer.get_submodule(name), "adapter", None)
        if adapter is None:
            return Linear(*weights)
        return Linear(*weights, adapter.a.data, adapter.wide_b.data * adapter.factor)

    return LayerWeights(
        attention_norm=read(*_ATTENTION_NORM),
        qkv=linear("self_attention.linear_qkv", architecture.qkv_bias),
        q_norm=read("self_attention.q_layernorm.weight") if architecture.qk_norm else None,
        k_norm=read("self_attention.k_layernorm.weight") if architecture.qk_norm else None,
        proj=linear("self_attention.linear_proj"),
        mlp_norm=read(*_MLP_NORM),
        fc1=linear("mlp.linear_fc1"),
        fc2=linear("mlp.linear_fc2"),
    )


@dataclass
class Cache:
    """Rotated keys and values of this rank's layers. All are finite, masked ones too: a mask's
    weight is 0, and 0 · NaN is NaN."""

    keys: list[Tensor]  # per layer [B, G, S, D]
    values: list[Tensor]
    rows: Tensor  # 0 … B - 1
    slots: Tensor  # 0 … S - 1


class Decoder:
    """Prefill and decode steps of one replica, whose ranks all make the same calls.

    `chunks` are this stage's GPTModels in virtual-stage order, wrapped or not. Their weights are
    read at construction: build one per generation. Sequences have at most `positions` tokens.
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
        first, last = models[0], models[-1]
        if mesh.is_first_stage:
            self.embedding = first.embedding.word_embeddings.weight.data
        if mesh.is_last_stage:
            self.final_norm = last.decoder.final_layernorm.weight.data
            self.output = output_weight(last).data
        self.dtype = self.layers[0][0].qkv.weight.dtype
        self.num_groups = architecture.num_kv_heads // mesh.tensor_size
        self.rope = _rope_tables(architecture, positions, mesh.device, self.dtype)
        ranks, place = dist.get_process_group_ranks(mesh.pipeline_group), mesh.pipeline_rank
        self.previous, self.next = ranks[place - 1], ranks[(place + 1) % len(ranks)]

    def allocate(self, rows: int, slots: int) -> Cache:
        shape = (rows, self.num_groups, slots, self.architecture.head_dim)
        count, device = sum(len(chunk) for chunk in self.layers), self.mesh.device
        keys, values = (
            [torch.zeros(shape, dtype=self.dtype, device=device) for _ in range(count)]
            for _ in range(2)
        )
        return Cache(
            keys, values, torch.arange(rows, device=device), torch.arange(slots, device=device)
        )

    def _bias(self, hidden: Tensor) -> Tensor:
        """Return the additive mask [b, 1, 1, S] of a bool mask [b, S]: -inf where it is True."""
        zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))[:, None, None]

    def prefill(
        self, tokens: Tensor, lengths: Tensor, cache: Cache, first_row: int
    ) -> Tensor | None:
        """Write right-padded prompts [b, P] into rows first_row … of the cache. Returns the logits
        of each prompt's last token, as `step` does."""
        rows, width = slice(first_row, first_row + len(tokens)), tokens.shape[1]
        cos, sin = (table[:width, None, None] for table in self.rope)
        bias = self._bias(torch.arange(width, device=tokens.device) >= lengths[:, None])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            cache.keys[layer][rows, :, :width] = k
            cache.values[layer][rows, :, :width] = v
            if q.shape[1] == 1:  # the last layer needs each prompt's last token only
                return _attend_one(q[:, 0], k, v, bias).flatten(1)[:, None]
            q = q.flatten(2, 3).transpose(1, 2)
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return out.transpose(1, 2).flatten(2)

        hidden = self._pipeline(tokens, cos, sin, attend, lengths - 1)
        return self._logits(hidden[:, 0]) if hidden is not None else None

    def step(self, tokens: Tensor, positions: Tensor, cache: Cache, slots: int) -> Tensor | None:
        """Write one token [b] at `positions` [b] of the cache's first b rows, and attend to the
        first `slots` slots up to it. Returns logits [b, V] on the tensor ranks of the last stage,
        else None. The host reads no tensor here."""
        cos, sin = (table[positions][:, None, None, None] for table in self.rope)
        bias, rows = self._bias(cache.slots[:slots] > positions[:, None]), cache.rows[: len(tokens)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[rows, :, positions], values[rows, :, positions] = k[:, 0], v[:, 0]
            keys, values = (x[: len(rows), :, :slots] for x in (keys, values))
            return _attend_one(q[:, 0], keys, values, bias).flatten(1)[:, None]

        hidden = self._pipeline(tokens[:, None], cos, sin, attend, torch.zeros_like(tokens))
        return self._logits(hidden[:, 0]) if hidden is not None else None

    def _pipeline(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, attend: Attend, last_tokens: Tensor
    ) -> Tensor | None:
        """Run all layers over all stages and virtual stages. Returns the last stage's hidden state
        [b, 1, H] at `last_tokens` [b], None elsewhere."""
        index, hidden, group = 0, None, self.mesh.pipeline_group
        for virtual, chunk in enumerate(self.layers):
            if self.mesh.is_first_stage and virtual == 0:
                hidden = self._embed(tokens)
            elif self.mesh.pipeline_size > 1:
                shape = (*tokens.shape, self.architecture.hidden_size)
                hidden = torch.empty(shape, dtype=self.dtype, device=self.mesh.device)
                dist.recv(hidden, src=self.previous, group=group)
            assert hidden is not None
            final = self.mesh.is_last_stage and virtual == len(self.layers) - 1
            for weights in chunk:
                kept = last_tokens if final and weights is chunk[-1] else None
                hidden = self._layer(weights, hidden, cos, sin, index, attend, kept)
                index += 1
            if final:
                return hidden
            if self.mesh.pipeline_size > 1:
                dist.send(hidden, dst=self.next, group=group)
        return None

    def _layer(
        self,
        w: LayerWeights,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        index: int,
        attend: Attend,
        kept: Tensor | None,
    ) -> Tensor:
        """Run one layer [b, n, H]. With positions `kept` [b], all tokens get keys and values, but
        the output is [b, 1, H] at those positions."""
        width, eps = self.architecture.head_dim, self.architecture.norm_eps
        qkv = w.qkv(rms_norm(x, w.attention_norm, eps))
        qkv = qkv.view(*x.shape[:2], self.num_groups, -1, width)
        qk, v = qkv[..., :-1, :].contiguous(), qkv[..., -1, :]
        if w.q_norm is not None and w.k_norm is not None:
            q, k = (
                rms_norm(qk[..., :-1, :], w.q_norm, eps),
                rms_norm(qk[..., -1:, :], w.k_norm, eps),
            )
            qk = torch.cat([q, k], dim=-2)
        qk = torch.addcmul(qk * cos, qk.roll(width // 2, -1), sin)
        q = qk[..., :-1, :]
        if kept is not None and x.shape[1] > 1:
            rows = torch.arange(len(x), device=x.device)
            q, x = q[rows, kept][:, None], x[rows, kept][:, None]
        attention = attend(index, q, qk[..., -1, :], v)
        x = x + self._sum(w.proj(attention))
        gate, up = w.fc1(rms_norm(x, w.mlp_norm, eps)).chunk(2, -1)
        return x + self._sum(w.fc2(F.silu(gate).mul_(up)))

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.mesh.tensor_size == 1:
            return F.embedding(tokens, self.embedding)
        local = tokens - self.mesh.tensor_rank * len(self.embedding)
        mine = (local >= 0) & (local < len(self.embedding))
        return self._sum(F.embedding(torch.where(mine, local, 0), self.embedding) * mine[..., None])

    def _logits(self, hidden: Tensor) -> Tensor:
        """[b, H] -> [b, V] without Megatron's padding columns, gathered over the tensor ranks."""
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
    """Return x / sqrt(mean(x²) + eps) · weight over the last axis, computed in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b. For few rows a CPU with two threads is 10 to 30 % faster on (W xᵀ)ᵀ, which
    splits W's rows over the threads."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or rows > _FEW_ROWS or bias is not None:
        return F.linear(x, weight, bias)
    return torch.mm(weight, x.reshape(rows, -1).t()).t().view(*x.shape[:-1], -1)


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Return the attention of one new token: q [b, G, Q, D] over keys and values [b, G, S, D]. The
    queries of a group share its keys without a copy.

    In fp32 two matrix products are about twice as fast on a CPU as torch's fused kernel. In bf16
    the fused kernel keeps the scores in fp32.
    """
    if q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, keys.transpose(-1, -2))
    if bias is not None:
        scores += bias
    return torch.matmul(scores.softmax(-1), values)


def _rope_tables(
    architecture: Architecture, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin [length, D], so that rope(x) = x · cos + roll(x, D / 2) · sin."""
    angles = rope_angles(rope_frequencies(architecture).to(device), length)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)
