"""Sharding rules: how each whole tensor of a model is cut into the parameters of the ranks.

The name of a whole tensor is the local layer spec's, with the layer's number in the whole model:
decoder.layers.7.mlp.linear_fc1.weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
SCORE = "score.weight"

# suffix -> (dimension split over the tensor group, number of equal blocks that are each split)
_SPLIT = {
    "self_attention.linear_qkv.weight": (0, 1),
    "self_attention.linear_qkv.bias": (0, 1),
    "self_attention.linear_proj.weight": (1, 1),
    "mlp.linear_fc1.weight": (0, 2),  # gate, then up
    "mlp.linear_fc2.weight": (1, 1),
}
_NORMS = (
    "input_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "decoder.final_layernorm.weight",
)
# Transformer Engine's fused modules keep the norm inside the linear layer
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


ADAPTER = ".adapter."  # between a linear layer's name and a or b (adapters.py)


@dataclass(frozen=True)
class Placement:
    """The cut of one whole tensor over the tensor group."""

    name: str
    dim: int | None = None  # None: every rank has all of it
    blocks: int = 1
    rows: int | None = None  # vocabulary rows before padding

    def full_shape(self, local: Tensor, tensor_size: int) -> tuple[int, ...]:
        """Return the shape of the whole tensor, without vocabulary padding."""
        shape = list(local.shape)
        if self.dim is not None:
            shape[self.dim] *= tensor_size
        if self.rows is not None:
            shape[0] = self.rows
        return tuple(shape)

    def take(self, full: Tensor, rank: int, local: Tensor, tensor_size: int) -> Tensor:
        """Return rank `rank`'s slice of `full`, shaped like `local`. Padding rows of the vocabulary
        are zero."""
        if self.dim is None:
            return full
        if self.rows is not None:
            size = local.shape[0]
            piece = full[rank * size : (rank + 1) * size]
            padding = piece.new_zeros((size - piece.shape[0], *piece.shape[1:]))
            return torch.cat([piece, padding])
        blocks = full.chunk(self.blocks, self.dim)
        pieces = [block.chunk(tensor_size, self.dim)[rank] for block in blocks]
        return torch.cat(pieces, self.dim) if len(pieces) > 1 else pieces[0]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the whole tensor from the parts of all ranks of a tensor group."""
        if self.dim is None:
            return parts[0]
        cut = [part.chunk(self.blocks, self.dim) for part in parts]
        full = torch.cat([piece for block in zip(*cut, strict=True) for piece in block], self.dim)
        return full if self.rows is None else full[: self.rows]


def unwrap(chunk: nn.Module) -> GPTModel:
    """Return the GPTModel inside mcore's wrappers (DistributedDataParallel)."""
    while not isinstance(chunk, GPTModel):
        inner = chunk.module
        assert isinstance(inner, nn.Module)
        chunk = inner
    return chunk


def placements(chunk: nn.Module, vocab_size: int) -> Iterator[tuple[Placement, nn.Parameter]]:
    """Yield every parameter of a chunk with its place in the whole model. A tied output layer on a
    later stage has the embedding's name."""
    model = unwrap(chunk)
    for local_name, parameter in model.named_parameters():
        yield _placement(model, local_name, vocab_size), parameter


def _placement(model: GPTModel, local_name: str, vocab_size: int) -> Placement:
    if local_name == EMBEDDING:
        return Placement(EMBEDDING, dim=0, rows=vocab_size)
    if local_name == OUTPUT:
        weight = model.output_layer.weight
        if isinstance(weight, nn.Parameter) and weight.shape[0] == 1:
            return Placement(SCORE)
        name = EMBEDDING if model.share_embeddings_and_output_weights else OUTPUT
        return Placement(name, dim=0, rows=vocab_size)
    if local_name in _NORMS:
        return Placement(local_name)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", local_name)
    assert match, f"no sharding rule for parameter {local_name}"
    suffix = _FUSED_NORMS.get(match[2], match[2])
    layer = model.decoder.layers[int(match[1])].layer_number - 1
    name = f"decoder.layers.{layer}.{suffix}"
    linear, adapter, matrix = suffix.partition(ADAPTER)
    if adapter:
        dim, blocks = _SPLIT[f"{linear}.weight"]
        # b has the rows of the weight and a its columns; the other one is whole on every rank
        return Placement(name, dim, blocks) if "ba"[dim] == matrix else Placement(name)
    assert suffix in _SPLIT or suffix in _NORMS, f"no sharding rule for parameter {local_name}"
    return Placement(name, *_SPLIT[suffix]) if suffix in _SPLIT else Placement(name)


def linears(chunk: nn.Module) -> Iterator[tuple[Placement, nn.Module]]:
    """Yield every linear layer of a chunk's decoder, with the place of its weight."""
    for layer in unwrap(chunk).decoder.layers:
        for suffix, cut in _SPLIT.items():
            path, kind = suffix.rsplit(".", 1)
            if kind == "weight":
                name = f"decoder.layers.{layer.layer_number - 1}.{suffix}"
                yield Placement(name, *cut), layer.get_submodule(path)
