"""One table per model: every Megatron parameter and the Hugging Face tensors that form it, used in
both directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gipo_megatron.megatron.param_sharding import EMBEDDING, OUTPUT, SCORE
from gipo_megatron.specs import Architecture

HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"
HF_SCORE = "score.weight"


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors that form it."""

    name: str  # layout-free Megatron name
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: str  # copy | stack | qkv

    def fuse(self, parts: Sequence[Tensor], a: Architecture) -> Tensor:
        """Return the Megatron parameter. qkv: for each key/value group its query heads, its key,
        its value. stack: one below the other."""
        if self.kind == "copy":
            return parts[0]
        if self.kind == "stack":
            return torch.cat(list(parts))
        grouped = [part.reshape(a.num_kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)

    def split(self, full: Tensor, a: Architecture) -> tuple[Tensor, ...]:
        """Invert `fuse`; return parts of `full` itself where they are in one piece."""
        if self.kind == "copy":
            return (full,)
        if self.kind == "stack":
            return full.chunk(len(self.hf))
        grouped = full.reshape(a.num_kv_heads, -1, *full.shape[1:])
        sizes = [shape[0] // a.num_kv_heads for shape in self.shapes]
        return tuple(part.flatten(0, 1) for part in grouped.split(sizes, 1))


def table(a: Architecture, head: str | None = None) -> list[Entry]:
    """Return all parameters of a model in model order. With a head, `score.weight` [1, H]
    (AutoModelForSequenceClassification) is the last."""
    h = a.hidden_size
    entries = [_copy(EMBEDDING, HF_EMBEDDING, a.vocab_size, h)]
    for i in range(a.num_layers):
        entries += _layer(a, f"decoder.layers.{i}.", f"model.layers.{i}.")
    entries.append(_copy("decoder.final_layernorm.weight", "model.norm.weight", h))
    if head is not None:
        entries.append(_copy(SCORE, HF_SCORE, 1, h))
    elif not a.tied_embeddings:
        entries.append(_copy(OUTPUT, HF_OUTPUT, a.vocab_size, h))
    return entries


def _copy(name: str, hf: str, *shape: int) -> Entry:
    return Entry(name, (hf,), (shape,), "copy")


def _layer(a: Architecture, ours: str, theirs: str) -> Iterator[Entry]:
    h, f, d = a.hidden_size, a.ffn_hidden_size, a.head_dim
    q, kv = a.num_heads * d, a.num_kv_heads * d
    attention, mlp = f"{ours}self_attention.", f"{ours}mlp."
    qkv = [f"{theirs}self_attn.{x}_proj." for x in "qkv"]
    yield _copy(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", h)
    weights = tuple(f"{x}weight" for x in qkv)
    yield Entry(f"{attention}linear_qkv.weight", weights, ((q, h), (kv, h), (kv, h)), "qkv")
    if a.qkv_bias:
        biases = tuple(f"{x}bias" for x in qkv)
        yield Entry(f"{attention}linear_qkv.bias", biases, ((q,), (kv,), (kv,)), "qkv")
    if a.qk_norm:
        for x in "qk":
            norm = f"{attention}{x}_layernorm.weight"
            yield _copy(norm, f"{theirs}self_attn.{x}_norm.weight", d)
    yield _copy(f"{attention}linear_proj.weight", f"{theirs}self_attn.o_proj.weight", h, q)
    norm = f"{theirs}post_attention_layernorm.weight"
    yield _copy(f"{ours}pre_mlp_layernorm.weight", norm, h)
    gate_up = tuple(f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up"))
    yield Entry(f"{mlp}linear_fc1.weight", gate_up, ((f, h), (f, h)), "stack")
    yield _copy(f"{mlp}linear_fc2.weight", f"{theirs}mlp.down_proj.weight", h, f)
