"""Adapters as PEFT's tensors: lora_A [rank, in] and lora_B [out, rank] of each Hugging Face layer,
in both directions. A head that is trained beside them comes with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gipo_megatron.megatron.adapters import layer_of
from gipo_megatron.megatron.hf import check_names, held, whole_tensors
from gipo_megatron.megatron.hf_table import Entry, table
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.param_sharding import ADAPTER, SCORE
from gipo_megatron.specs import AdapterSpec, Architecture
from gipo_megatron.weights.hf_files import open_weights, save_tensors
from gipo_megatron.weights.peft_config import CONFIG, PREFIX, TENSORS


def adapter_table(a: Architecture, spec: AdapterSpec, head: str | None = None) -> list[Entry]:
    """Return the adapters' parameters in model order, and the head. A layer of a fused matrix that
    has no adapter is in the matrix's B, and not in a file."""
    entries: list[Entry] = []
    for weight in table(a, head):
        linear, _, kind = weight.name.rpartition(".")
        layers = [name.removesuffix("weight") for name in weight.hf]
        adapted = [name for name in weight.hf if layer_of(name) in spec.targets]
        if weight.name == SCORE:
            entries.append(weight)
        elif kind == "weight" and adapted:
            names = tuple(name.removesuffix("weight") + "lora_A.weight" for name in adapted)
            shapes = ((spec.rank, weight.shapes[0][1]),) * len(adapted)
            entries.append(Entry(f"{linear}{ADAPTER}a", names, shapes, "stack"))
            names = tuple(f"{layer}lora_B.weight" for layer in layers)
            shapes = tuple((shape[0], spec.rank) for shape in weight.shapes)
            entries.append(Entry(f"{linear}{ADAPTER}b", names, shapes, weight.kind))
    return entries


def _in_file(entry: Entry, spec: AdapterSpec) -> Entry:
    """Return the entry without the layers that have no adapter."""
    kept = [i for i, name in enumerate(entry.hf) if _stored(name, spec)]
    return replace(
        entry, hf=tuple(entry.hf[i] for i in kept), shapes=tuple(entry.shapes[i] for i in kept)
    )


def _stored(name: str, spec: AdapterSpec) -> bool:
    return "lora_" not in name or name.split(".")[-3] in spec.targets


def export_adapters(
    chunks: Sequence[nn.Module],
    mesh: Mesh,
    architecture: Architecture,
    spec: AdapterSpec,
    *,
    head: str | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (PEFT's name without `base_model.model.`, whole tensor) as `hf.export_weights` does."""
    entries = adapter_table(architecture, spec, head)
    for entry, full in whole_tensors(entries, chunks, mesh, architecture):
        for name, part in zip(entry.hf, entry.split(full, architecture), strict=True):
            if _stored(name, spec):
                yield name, part


@torch.no_grad()
def load_adapters(
    source: Path | Mapping[str, Tensor],
    chunks: Sequence[nn.Module],
    mesh: Mesh,
    architecture: Architecture,
    spec: AdapterSpec,
    *,
    head: str | None = None,
) -> None:
    """Copy adapters, and a head, of a PEFT folder into this rank's chunks; every rank reads it
    itself. With an optimizer, call `Engine.weights_changed` afterwards.

    Raises UserError naming missing and unexpected tensors and wrong shapes, before anything is
    copied.
    """
    weights = open_weights(source)
    entries = adapter_table(architecture, spec, head)
    check_names(weights, [_in_file(entry, spec) for entry in entries], architecture, head)
    mine = held(chunks, architecture)
    for entry in entries:
        if entry.name in mine:
            place, parameter = mine[entry.name]
            parts = [
                weights.read(name) if _stored(name, spec) else torch.zeros(shape)
                for name, shape in zip(entry.hf, entry.shapes, strict=True)
            ]
            full = entry.fuse(parts, architecture)
            parameter.copy_(place.take(full, mesh.tensor_rank, parameter, mesh.tensor_size))


def save_adapters(
    folder: Path, weights: Iterator[tuple[str, Tensor]], mesh: Mesh, config: str
) -> None:
    """Write exported adapters and `config`, the text of adapter_config.json, as PEFT and vLLM read
    them. Collective; rank 0 writes. Raises OSError (a full disk)."""
    tensors = {PREFIX + name: tensor.cpu().contiguous() for name, tensor in weights}
    if mesh.is_main:
        save_tensors(folder / TENSORS, tensors)
        (folder / CONFIG).write_text(config, encoding="utf-8")
