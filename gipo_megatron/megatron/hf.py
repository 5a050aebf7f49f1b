"""Every parameter between Hugging Face checkpoints (Llama 2/3, Mistral, Qwen2, Qwen3) and this rank's model chunks, in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gipo_megatron.errors import UserError
from gipo_megatron.hf_config import architecture_from_hf, config_for
from gipo_megatron.megatron.layout import EMBEDDING, OUTPUT, SCORE, Placement, placements
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Architecture

__all__ = ["architecture_from_hf", "export_weights", "load_hf", "save_hf", "table"]

SHARD_BYTES = 4 << 30
HF_SCORE = "score.weight"
HF_OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    name: str  # layout-free Megatron name
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: str  # copy | gate_up | qkv

    def fuse(self, parts: Sequence[Tensor], a: Architecture) -> Tensor:
        """qkv: for each key/value group its query heads, its key, its value. gate_up: gate, then up."""
        if self.kind == "copy":
            return parts[0]
        if self.kind == "gate_up":
            return torch.cat(list(parts))
        grouped = [part.reshape(a.num_kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)

    def split(self, full: Tensor, a: Architecture) -> tuple[Tensor, ...]:
        """The inverse of `fuse`; new tensors, not views of a live weight."""
        if self.kind == "copy":
            return (full.clone(),)
        if self.kind == "gate_up":
            return tuple(part.clone() for part in full.chunk(2))
        grouped = full.reshape(a.num_kv_heads, -1, *full.shape[1:])
        sizes = [shape[0] // a.num_kv_heads for shape in self.shapes]
        return tuple(part.flatten(0, 1).clone() for part in grouped.split(sizes, 1))


def table(a: Architecture, head: str | None = None) -> list[Entry]:
    """All parameters of a model in model order. With a head, `score.weight` [1, H] (AutoModelForSequenceClassification) ends it."""
    h, f, d = a.hidden_size, a.ffn_hidden_size, a.head_dim
    q, kv = a.num_heads * d, a.num_kv_heads * d
    entries = [Entry(EMBEDDING, ("model.embed_tokens.weight",), ((a.vocab_size, h),), "copy")]
    for i in range(a.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        qkv = tuple(f"{theirs}self_attn.{x}_proj." for x in "qkv")
        gate_up = tuple(f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up"))
        entries.append(Entry(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",), ((h,),), "copy"))
        weights = tuple(x + "weight" for x in qkv)
        entries.append(Entry(ours + "self_attention.linear_qkv.weight", weights, ((q, h), (kv, h), (kv, h)), "qkv"))
        if a.qkv_bias:
            biases = tuple(x + "bias" for x in qkv)
            entries.append(Entry(ours + "self_attention.linear_qkv.bias", biases, ((q,), (kv,), (kv,)), "qkv"))
        if a.qk_norm:
            for x in "qk":
                entries.append(
                    Entry(f"{ours}self_attention.{x}_layernorm.weight", (f"{theirs}self_attn.{x}_norm.weight",), ((d,),), "copy")
                )
        entries.append(Entry(ours + "self_attention.linear_proj.weight", (theirs + "self_attn.o_proj.weight",), ((h, q),), "copy"))
        entries.append(Entry(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",), ((h,),), "copy"))
        entries.append(Entry(ours + "mlp.linear_fc1.weight", gate_up, ((f, h), (f, h)), "gate_up"))
        entries.append(Entry(ours + "mlp.linear_fc2.weight", (theirs + "mlp.down_proj.weight",), ((h, f),), "copy"))
    entries.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((h,),), "copy"))
    if head is not None:
        entries.append(Entry(SCORE, (HF_SCORE,), ((1, h),), "copy"))
    elif not a.tied_embeddings:
        entries.append(Entry(OUTPUT, (HF_OUTPUT,), ((a.vocab_size, h),), "copy"))
    return entries


# --------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Source:
    """Tensors by name: the shapes at once, the data when asked for."""

    where: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def _open(source: str | Path | Mapping[str, Tensor]) -> _Source:
    if isinstance(source, Mapping):
        return _Source("state dict", {name: tuple(t.shape) for name, t in source.items()}, source.__getitem__)
    folder = Path(source)
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    files[name], shapes[name] = path, tuple(shard.get_slice(name).get_shape())
        except Exception as error:  # safetensors raises its own type for a damaged header, OSError for a missing file
            raise UserError(f"cannot read {path.name}: {error}", where=str(path), fix="download or export this file again") from error

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as shard:
            return shard.get_tensor(name)

    return _Source(str(folder), shapes, read)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    fix = "give a Hugging Face folder with model.safetensors or model.safetensors.index.json (a .bin model: save it again as safetensors)"
    raise UserError("no safetensors weights here", where=f"{folder} (found: {found})", fix=fix)


def load_hf(
    source: str | Path | Mapping[str, Tensor],
    chunks: Sequence[nn.Module],
    mesh: Mesh,
    architecture: Architecture,
    *,
    head: str | None = None,
) -> tuple[str, ...]:
    """Copies a Hugging Face model into this rank's chunks, one tensor in memory at a time; every rank reads the folder itself.

    Returns the names that the source lacks and that keep their initial values: ("score.weight",) when a language model starts a reward
    model or a critic, else (). The caller of an optimizer follows with `reload_model_params()`.
    Raises UserError naming missing and unexpected tensors and wrong shapes, before anything is copied.
    """
    reader = _open(source)
    entries = table(architecture, head)
    fresh = (HF_SCORE,) if head is not None and HF_SCORE not in reader.shapes else ()
    entries = [entry for entry in entries if entry.hf != fresh]
    _check_names(reader, entries, architecture, head)
    mine = _held(chunks, architecture)
    for entry in entries:
        if entry.name not in mine:
            continue
        place, parameter = mine[entry.name]
        full = entry.fuse([reader.read(name) for name in entry.hf], architecture)
        with torch.no_grad():
            parameter.copy_(place.take(full, mesh.tensor_rank, parameter, mesh.tensor_size))
    return fresh


def _held(chunks: Sequence[nn.Module], architecture: Architecture) -> dict[str, tuple[Placement, nn.Parameter]]:
    return {place.name: (place, parameter) for chunk in chunks for place, parameter in placements(chunk, architecture.vocab_size)}


def _check_names(reader: _Source, entries: Sequence[Entry], architecture: Architecture, head: str | None) -> None:
    expected = {name: shape for entry in entries for name, shape in zip(entry.hf, entry.shapes, strict=True)}
    missing = [name for name in expected if name not in reader.shapes]
    allowed = {HF_OUTPUT} if head is not None or architecture.tied_embeddings else set()
    unexpected = [n for n in reader.shapes if n not in expected and n not in allowed and not n.endswith("rotary_emb.inv_freq")]
    wrong = [
        f"{name} is {list(reader.shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in reader.shapes and reader.shapes[name] != shape
    ]
    problems = [_some("missing", missing), _some("unexpected", unexpected), _some("wrong shape", wrong)]
    if any(problems):
        what = "these weights are not of this architecture\n" + "\n".join(f"  {p}" for p in problems if p)
        raise UserError(what, where=reader.where, fix="compare the folder's config.json with the recipe's architecture")


def _some(title: str, names: Sequence[str], limit: int = 6) -> str:
    if not names:
        return ""
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return f"{title} ({len(names)}): " + ", ".join(names[:limit]) + more


# --------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def export_weights(
    chunks: Sequence[nn.Module], mesh: Mesh, architecture: Architecture, *, head: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) in model order, at any TP × PP × VPP, on every rank.

    Collective: every rank of the replica iterates to the end. Tensors are copies, in the model's dtype, on the mesh's device.
    """
    mine = _held(chunks, architecture)
    ranks = dist.get_process_group_ranks(mesh.pipeline_group)
    dtype = next(iter(chunks[0].parameters())).dtype
    for entry in table(architecture, head):
        stage = _stage(entry.name, mesh, architecture)
        if stage == mesh.pipeline_rank:
            full = _gather(*mine[entry.name], mesh).contiguous()
        else:
            shape = (sum(s[0] for s in entry.shapes), *entry.shapes[0][1:])
            full = torch.empty(shape, dtype=dtype, device=mesh.device)
        if mesh.pipeline_size > 1:
            dist.broadcast(full, src=ranks[stage], group=mesh.pipeline_group)
        yield from zip(entry.hf, entry.split(full, architecture), strict=True)


def _stage(name: str, mesh: Mesh, architecture: Architecture) -> int:
    """The pipeline rank that holds a parameter: chunk k of the model is on stage k mod pipeline."""
    if name == EMBEDDING:
        return 0
    if not name.startswith("decoder.layers."):
        return mesh.pipeline_size - 1
    layers_per_chunk = architecture.num_layers // (mesh.pipeline_size * mesh.parallel.virtual_pipeline)
    return int(name.split(".")[2]) // layers_per_chunk % mesh.pipeline_size


def _gather(place: Placement, parameter: Tensor, mesh: Mesh) -> Tensor:
    if place.dim is None or mesh.tensor_size == 1:
        return place.join([parameter.detach()])
    parts = [torch.empty_like(parameter) for _ in range(mesh.tensor_size)]
    dist.all_gather(parts, parameter.detach().contiguous(), group=mesh.tensor_group)
    return place.join(parts)


def save_hf(
    folder: str | Path,
    chunks: Sequence[nn.Module],
    mesh: Mesh,
    architecture: Architecture,
    *,
    head: str | None = None,
    tokens: Mapping[str, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors shards that transformers loads. Collective; replica 0's first rank writes.

    `tokens`: bos_token_id, eos_token_id, pad_token_id for config.json.
    """
    folder = Path(folder)
    if mesh.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    shards = _Shards(folder, shard_bytes) if mesh.is_main else None
    dtype = None
    for name, tensor in export_weights(chunks, mesh, architecture, head=head):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if shards is not None:
            shards.add(name, tensor.cpu().contiguous())
    if shards is not None and dtype is not None:
        shards.close()
        config = config_for(architecture, dtype, head=head, tokens=tokens)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mesh.barrier()


class _Shards:
    """Collects tensors and writes a file whenever `limit` bytes are together."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.waiting, self.bytes = folder, limit, dict[str, Tensor](), 0
        self.written: list[tuple[Path, list[str], int]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self.waiting and self.bytes + tensor.nbytes > self.limit:
            self._write()
        self.waiting[name] = tensor
        self.bytes += tensor.nbytes

    def _write(self) -> None:
        path = self.folder / f"model-{len(self.written) + 1:05d}.safetensors.part"
        save_file(self.waiting, path, metadata={"format": "pt"})
        self.written.append((path, list(self.waiting), self.bytes))
        self.waiting, self.bytes = {}, 0

    def close(self) -> None:
        self._write()
        count = len(self.written)
        weight_map: dict[str, str] = {}
        for number, (path, names, _) in enumerate(self.written, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": sum(size for _, _, size in self.written)}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
