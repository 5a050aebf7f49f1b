"""Low-rank adapters on the linear layers of a frozen model (LoRA): out = W x + factor · B A x.

A matrix that Megatron fuses (query, key, value; gate, up) has an adapter for each of its n parts,
as Hugging Face's layers and PEFT have:

    a  [n · rank, in]   the parts' A, one below the other
    b  [out, rank]      a row for each row of W, in W's order, so it is cut over the ranks as W is
    parts [out, n]      1 where the row belongs to the part, else 0; a part without adapter has no
                        column, and its rows of b stay 0

Tensor parallelism: where W's rows are cut, a is whole and h = A x is copied to all ranks; where its
columns are cut, a has this rank's columns, h is summed over the ranks, and b is whole. Under
sequence parallelism the same collectives gather and scatter the positions, of width n · rank, and
the gradient of the whole matrix is summed over the ranks by mcore (`sequence_parallel`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from gipo_megatron.megatron.heads import ScalarHead
from gipo_megatron.megatron.hf_table import Entry, table
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.param_sharding import Placement, linears
from gipo_megatron.specs import AdapterSpec, Architecture

_SPREAD = copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
_SUM = reduce_from_tensor_model_parallel_region, reduce_scatter_to_sequence_parallel_region


class Adapter(nn.Module):
    """The adapters of one linear layer, whose weight [out, in] is this rank's part.

    parts: [out, n]; dim: the dimension of the weight that is cut over the tensor group.
    """

    parts: Tensor

    def __init__(
        self, weight: Tensor, parts: Tensor, dim: int, spec: AdapterSpec, sequence: bool
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.factor = spec.factor
        self.a = nn.Parameter(weight.new_empty(parts.shape[1] * spec.rank, columns))
        self.b = nn.Parameter(weight.new_empty(rows, spec.rank))
        self.register_buffer("parts", parts.to(weight), persistent=False)
        self._exchange = (_SPREAD if dim == 0 else _SUM)[sequence]
        whole: Any = self.a if dim == 0 else self.b
        whole.sequence_parallel = sequence

    @property
    def wide_b(self) -> Tensor:
        """B of all parts as one matrix [out, n · rank]: a row of b in the columns of its part."""
        return (self.b[:, None] * self.parts[..., None]).flatten(1)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x [s, b, in], out = W x [s, b, out] -> W x + factor · B A x, both as the linear layer
        takes and gives them."""
        h = self._exchange(F.linear(x, self.a))
        added = torch.addmm(out.flatten(0, 1), h.flatten(0, 1), self.wide_b.t(), alpha=self.factor)
        return added.view_as(out)

    def merged(self, weight: Tensor) -> Tensor:
        """Return this rank's part of W + factor · B A, summed in fp32."""
        b, a = self.wide_b.float(), self.a.float()
        return torch.addmm(weight.float(), b, a, alpha=self.factor).to(weight.dtype)


def adapters_of(chunks: Sequence[nn.Module]) -> dict[str, Adapter]:
    """Return the adapters of model chunks by the names of the weights that they are added to."""
    found = {}
    for chunk in chunks:
        for place, linear in linears(chunk):
            adapter = getattr(linear, "adapter", None)
            if isinstance(adapter, Adapter):
                found[place.name] = adapter
    return found


def part_of_rows(entry: Entry, architecture: Architecture, targets: tuple[str, ...]) -> Tensor:
    """Return `parts` [out, n] of a whole fused matrix: n of its layers are among `targets`."""
    numbers = [torch.full(shape[:1], i) for i, shape in enumerate(entry.shapes)]
    owner = entry.fuse(numbers, architecture)
    wanted = [i for i, name in enumerate(entry.hf) if layer_of(name) in targets]
    return (owner[:, None] == torch.tensor(wanted, dtype=owner.dtype)).float()


def layer_of(name: str) -> str:
    """Return q_proj of model.layers.0.self_attn.q_proj.weight."""
    return name.split(".")[-2]


def adapt(model: GPTModel, spec: AdapterSpec, architecture: Architecture, mesh: Mesh) -> None:
    """Freeze all weights but a scalar head's, and give the linear layers of `targets` adapters,
    which are not initialised. Works on the layers of either spec, before mcore's wrappers."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if model.post_process and isinstance(model.output_layer, ScalarHead):
        model.output_layer.weight.requires_grad_(True)
    if model.pre_process and model.config.recompute_granularity is not None:
        model.embedding.register_forward_hook(_need_gradient)
    entries = {entry.name: entry for entry in table(architecture)}
    for place, linear in linears(model):
        parts = part_of_rows(entries[place.name], architecture, spec.targets)
        if parts.shape[1]:
            _attach(linear, place, parts, spec, mesh)


def _attach(
    linear: nn.Module, place: Placement, parts: Tensor, spec: AdapterSpec, mesh: Mesh
) -> None:
    weight, dim = linear.weight, place.dim
    assert isinstance(weight, Tensor) and dim is not None
    if dim == 0:
        parts = place.take(parts, mesh.tensor_rank, parts, mesh.tensor_size)
    sequence = mesh.parallel.sequence and mesh.tensor_size > 1
    linear.adapter = Adapter(weight.data, parts, dim, spec, sequence)
    linear.register_forward_hook(_add_adapter)


def _add_adapter(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> Any:
    (x, *_), (out, bias) = inputs, output
    norm = getattr(linear, "layer_norm_weight", None)
    if norm is not None:  # Transformer Engine's norm and linear layer in one, which keeps W's input
        x = F.rms_norm(x, norm.shape, norm, linear.eps)
    return linear.adapter(x, out), bias


def _need_gradient(embedding: nn.Module, inputs: Any, hidden: Tensor) -> None:
    """mcore's recompute has no gradient for what is inside, unless an input needs one."""
    if torch.is_grad_enabled():
        hidden.requires_grad_(True)
