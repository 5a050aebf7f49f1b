"""Copying weights between Hugging Face folders (Llama 2/3, Mistral, Qwen2, Qwen3) and this rank's
model chunks, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gipo_megatron.errors import UserError, library_errors
from gipo_megatron.megatron.adapters import Adapter, adapters_of
from gipo_megatron.megatron.heads import GroupHead
from gipo_megatron.megatron.hf_table import HF_EMBEDDING, HF_OUTPUT, HF_SCORE, Entry, table
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.param_sharding import EMBEDDING, Placement, placements
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_files import (
    FLOATS,
    SHARD_BYTES,
    Shards,
    Weights,
    open_weights,
    save_tensors,
)

GROUP_HEAD = "group_head.safetensors"
# called with each tensor's name and bytes once it is copied, for progress bars
Seen = Callable[[str, int], None]


def ignore(name: str, size: int) -> None:
    """Show nothing."""


def load_hf(
    source: str | Path | Mapping[str, Tensor],
    chunks: Sequence[nn.Module],
    mesh: Mesh,
    architecture: Architecture,
    *,
    head: str | None = None,
    but: Collection[str] = (),
    seen: Seen = ignore,
) -> tuple[str, ...]:
    """Copy a Hugging Face model into this rank's chunks, one tensor in memory at a time, without
    the parameters `but`; every rank reads the folder itself.

    Returns the names that the source lacks and that keep their initial values: ("score.weight",)
    when a language model starts a reward model or a critic, else (). With an optimizer, call
    `Engine.weights_changed` afterwards. Raises UserError naming missing and unexpected tensors and
    wrong shapes, before anything is copied.
    """
    weights = open_weights(source)
    entries = table(architecture, head)
    fresh = (HF_SCORE,) if head is not None and HF_SCORE not in weights.shapes else ()
    entries = [entry for entry in entries if entry.hf != fresh]
    check_names(weights, entries, architecture, head)
    _check_tied(weights, architecture, head)
    mine = held(chunks, architecture)
    for entry in entries:
        if entry.name in mine and entry.name not in but:
            place, parameter = mine[entry.name]
            full = entry.fuse([weights.read(name) for name in entry.hf], architecture)
            with torch.no_grad():
                parameter.copy_(place.take(full, mesh.tensor_rank, parameter, mesh.tensor_size))
            seen(entry.name, full.nbytes)
    return fresh


def load_group_head(folder: Path, head: GroupHead) -> bool:
    """Load a critic's group head from beside its weights, where it has this shape; return whether
    it was loaded."""
    path = folder / GROUP_HEAD
    if not path.is_file():
        return False
    with _readable(path):
        saved = load_file(path)
        if saved["weight"].shape != head.weight.shape:
            return False
        head.load_state_dict(head.state_dict() | saved)
    return True


def _readable(path: Path) -> AbstractContextManager[None]:
    return library_errors(f"cannot read {path.name}", where=str(path), fix="export it again")


def save_group_head(folder: Path, head: GroupHead) -> None:
    """Write W [M, H] and b [M] in fp32, and the token they read."""
    tensors = {
        name: p.detach().cpu().contiguous()
        for name, p in (("weight", head.weight), ("bias", head.bias))
    }
    save_tensors(folder / GROUP_HEAD, tensors, input=head.spec.input)


def saved_group_head(folder: Path) -> tuple[int, str]:
    """Return the number of groups and the token that a saved group head reads."""
    path = folder / GROUP_HEAD
    with _readable(path), safe_open(path, framework="pt") as saved:
        return saved.get_slice("weight").get_shape()[0], saved.metadata()["input"]


def same_group_head(folder: Path, head: GroupHead) -> bool:
    """Return whether the saved group head equals `head`, bit for bit."""
    saved = load_file(folder / GROUP_HEAD)
    return all(
        torch.equal(saved[name], p.detach().cpu())
        for name, p in (("weight", head.weight), ("bias", head.bias))
    )


def held(
    chunks: Sequence[nn.Module], architecture: Architecture
) -> dict[str, tuple[Placement, nn.Parameter]]:
    """Return this rank's parameters by the names of the whole tensors that they are cut from."""
    return {
        place.name: (place, parameter)
        for chunk in chunks
        for place, parameter in placements(chunk, architecture.vocab_size)
    }


def check_names(
    weights: Weights, entries: Sequence[Entry], architecture: Architecture, head: str | None
) -> None:
    """Raise UserError that names missing and unexpected tensors, and those of another shape, or of
    integers or FP8, whose scales would be lost."""
    pairs = [zip(entry.hf, entry.shapes, strict=True) for entry in entries]
    expected = {name: shape for pair in pairs for name, shape in pair}
    missing = [name for name in expected if name not in weights.shapes]
    allowed = {HF_OUTPUT} if head is not None or architecture.tied_embeddings else set()
    unexpected = [
        n
        for n in weights.shapes
        if n not in expected and n not in allowed and not n.endswith("rotary_emb.inv_freq")
    ]
    wrong = [
        f"{name} is {list(weights.shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in weights.shapes and weights.shapes[name] != shape
    ]
    read = [name for name in expected if name in weights.dtypes]
    problems = [
        _some("missing", missing),
        _some("unexpected", unexpected),
        _some("wrong shape", wrong),
        _some("quantised", [name for name in read if weights.dtypes[name] not in FLOATS]),
    ]
    if any(problems):
        what = "these weights are not of this architecture\n" + "\n".join(
            f"  {p}" for p in problems if p
        )
        fix = "compare the folder's config.json with the recipe's architecture"
        if weights.shapes.get(HF_SCORE, (1,))[0] != 1:
            fix = "reward models and critics have one label: num_labels 1"
        raise UserError(what, where=weights.where, fix=fix)


def _check_tied(weights: Weights, architecture: Architecture, head: str | None) -> None:
    """Raise UserError where config.json ties the embeddings, but the folder has a different output
    layer."""
    if head is not None or not architecture.tied_embeddings or HF_OUTPUT not in weights.shapes:
        return
    if weights.shapes[HF_OUTPUT] != weights.shapes[HF_EMBEDDING] or not torch.equal(
        weights.read(HF_OUTPUT), weights.read(HF_EMBEDDING)
    ):
        raise UserError(
            f"tie_word_embeddings is true, but {HF_OUTPUT} differs from {HF_EMBEDDING}",
            where=weights.where,
            fix=(
                "set tie_word_embeddings to false in config.json, or take the weights from the"
                " model's own repository"
            ),
        )


def _some(title: str, names: Sequence[str], limit: int = 6) -> str:
    if not names:
        return ""
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return f"{title} ({len(names)}): " + ", ".join(names[:limit]) + more


# ------------------------------------------------------------------------------------------ writing


def export_weights(
    chunks: Sequence[nn.Module], mesh: Mesh, architecture: Architecture, *, head: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor) in model order, at any TP × PP × VPP, on every rank;
    adapters are added to their weights.

    Collective: every rank of the replica iterates to the end. Tensors are copies, in the model's
    dtype, on the mesh's device.
    """
    adapters = adapters_of(chunks)
    for entry, full in whole_tensors(
        table(architecture, head), chunks, mesh, architecture, adapters
    ):
        yield from zip(entry.hf, entry.split(full, architecture), strict=True)


@torch.no_grad()
def whole_tensors(
    entries: Sequence[Entry],
    chunks: Sequence[nn.Module],
    mesh: Mesh,
    architecture: Architecture,
    merged: Mapping[str, Adapter] = MappingProxyType({}),
) -> Iterator[tuple[Entry, Tensor]]:
    """Yield each entry's whole Megatron tensor on every rank, with the adapter of that name in
    `merged` added. Collective."""
    mine: Mapping[str, tuple[Placement, Tensor]] = held(chunks, architecture)
    ranks = dist.get_process_group_ranks(mesh.pipeline_group)
    dtype = next(iter(chunks[0].parameters())).dtype
    for entry in entries:
        stage = _stage(entry.name, mesh, architecture)
        if stage == mesh.pipeline_rank:
            place, part = mine[entry.name]
            if entry.name in merged:
                part = merged[entry.name].merged(part)
            full = _gather(place, part, mesh).contiguous()
        else:
            shape = (sum(s[0] for s in entry.shapes), *entry.shapes[0][1:])
            full = torch.empty(shape, dtype=dtype, device=mesh.device)
        if mesh.pipeline_size > 1:
            dist.broadcast(full, src=ranks[stage], group=mesh.pipeline_group)
        yield entry, full


def _stage(name: str, mesh: Mesh, architecture: Architecture) -> int:
    """Return the pipeline rank of a parameter: chunk k of the model is on stage k mod pipeline."""
    if name == EMBEDDING:
        return 0
    if not name.startswith("decoder.layers."):
        return mesh.pipeline_size - 1
    layers_per_chunk = architecture.num_layers // (
        mesh.pipeline_size * mesh.parallel.virtual_pipeline
    )
    return int(name.split(".")[2]) // layers_per_chunk % mesh.pipeline_size


def _gather(place: Placement, parameter: Tensor, mesh: Mesh) -> Tensor:
    """Return the whole tensor in new memory."""
    if place.dim is None:
        return parameter.detach().clone()
    if mesh.tensor_size == 1:
        return place.join([parameter.detach()])
    parts = [torch.empty_like(parameter) for _ in range(mesh.tensor_size)]
    dist.all_gather(parts, parameter.detach().contiguous(), group=mesh.tensor_group)
    return place.join(parts)


def save_hf(
    folder: Path,
    weights: Iterator[tuple[str, Tensor]],
    mesh: Mesh,
    *,
    shard_bytes: int = SHARD_BYTES,
    seen: Seen = ignore,
) -> None:
    """Write exported weights as safetensors shards, one of them in memory. Collective; rank 0
    writes. Raises OSError (a full disk)."""
    if not mesh.is_main:
        for _ in weights:
            pass
        return
    shards = Shards(folder, shard_bytes)
    for name, tensor in weights:
        shards.add(name, tensor.cpu().contiguous())
        seen(name, tensor.nbytes)
    shards.close()


def differing(
    folder: Path, weights: Iterator[tuple[str, Tensor]], mesh: Mesh, *, seen: Seen = ignore
) -> list[str]:
    """Return the names of exported weights that a folder lacks, or that differ from it in any bit.

    Collective; rank 0 compares, others return []. A folder of another dtype is compared after
    conversion to the model's (exact when the model's is wider).
    """
    files = open_weights(folder) if mesh.is_main else None
    different = []
    for name, tensor in weights:
        if files is None:
            continue
        mine = tensor.cpu()
        if files.shapes.get(name) != tuple(mine.shape) or not _same_bits(
            files.read(name).to(mine.dtype), mine
        ):
            different.append(name)
        seen(name, tensor.nbytes)
    return different


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
