"""Folders of safetensors: names and shapes at once, tensors one at a time, written shard by
shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gipo_megatron.errors import UserError
from gipo_megatron.files import inside, read_object, refuse_pointer
from gipo_megatron.tensors import Tensor
from gipo_megatron.weights.hf_values import BLOCK, FIX, TEXT, check_values
from gipo_megatron.weights.peft_config import CONFIG, PREFIX, TENSORS

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
# safetensors' names; others are quantised or no weights
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOATS = {*BYTES, "F64", "float64"}  # that are loaded
OUR_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
HF_DTYPES = {ours: theirs for theirs, ours in OUR_DTYPES.items()}


@dataclass(frozen=True)
class Weights:
    """Tensors by name: shapes and dtypes in memory, the data when it is read."""

    where: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], Tensor]


def open_weights(source: str | Path | Mapping[str, Tensor]) -> Weights:
    """Return the tensors of a Hugging Face folder, of PEFT's adapters (without their prefix), or of
    a state dict.

    Raises UserError for a missing, damaged or truncated file, an unreadable index, tensors that
    only the index lists, and an index beside another model's single file.
    """
    if isinstance(source, Mapping):
        shapes = {name: tuple(t.shape) for name, t in source.items()}
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in source.items()}
        return Weights("state dict", shapes, dtypes, source.__getitem__)
    folder = Path(source)
    files: dict[str, tuple[Path, str]] = {}
    shapes, dtypes = {}, {}
    listed = _index(folder)
    for path in _weight_files(folder, listed):
        for stored, shape, dtype in _header(path):
            name = stored.removeprefix(PREFIX)
            files[name], shapes[name], dtypes[name] = (path, stored), shape, dtype
    if lost := [f"{name} ({file})" for name, file in listed.items() if name not in files]:
        shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        raise UserError(
            f"{INDEX} lists tensors that its files do not hold: {shown}",
            where=str(folder),
            fix="download the folder again",
        )

    def read(name: str) -> Tensor:
        path, stored = files[name]
        with safe_open(path, framework="pt") as shard:
            return shard.get_tensor(stored)

    return Weights(str(folder), shapes, dtypes, read)


def _header(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return (name, shape, dtype) of a file's tensors. safetensors compares the header with the
    file's length, so a truncated file is found here."""
    try:
        refuse_pointer(path)
        with safe_open(path, framework="np") as shard:  # the header alone: no need of torch
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
            return [
                (name, tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype()))
                for name, s in slices.items()
            ]
    except (OSError, SafetensorError) as error:
        size = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        raise _unreadable(path, f"{path.name} ({size}): {error}") from error


def _unreadable(path: Path, what: str) -> UserError:
    return UserError(
        f"cannot read {what}", where=str(path), fix="download or export this file again"
    )


def _index(folder: Path) -> dict[str, str]:
    """Return {tensor: file} of a model in several files; empty for one in a single file."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    content = read_object(path, FIX)
    check_values({"weight_map": None} | content, {"weight_map": BLOCK}, str(path))
    weight_map: dict[str, str] = content["weight_map"]
    check_values(weight_map, dict.fromkeys(weight_map, TEXT), str(path), block="weight_map.")
    return weight_map


def _weight_files(folder: Path, listed: Mapping[str, str]) -> list[Path]:
    if (folder / CONFIG).is_file():
        return [folder / TENSORS]
    files = sorted(set(listed.values()))
    single = (folder / SINGLE).is_file()
    if single and files not in ([], [SINGLE]):
        raise UserError(
            f"two models in one folder: {SINGLE}, which transformers would read, and {INDEX}, which"
            f" lists {files[0]}",
            where=str(folder),
            fix="remove the older of the two, with its files",
        )
    if files:
        return [inside(folder, name, str(folder / INDEX)) for name in files]
    if single:
        return [folder / SINGLE]
    found = "no such folder"
    if folder.is_dir():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
    raise UserError(
        "no safetensors weights here",
        where=f"{folder} (found: {found})",
        fix=(
            f"give a Hugging Face folder with {SINGLE} or {INDEX} (a .bin model: save it again as"
            " safetensors)"
        ),
    )


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write a file of safetensors, readable by all who may read its folder: the library makes one
    for its owner alone. Raises OSError (a full disk)."""
    from safetensors.torch import save_file  # imports torch

    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # a full disk comes as this, without its errno
        raise OSError(f"cannot write {path.name}: {error}") from error
    path.chmod(path.parent.stat().st_mode & 0o666)


class Shards:
    """A model's files: a file is written before more than `limit` bytes are in memory; `close`
    gives the files transformers' names."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder, self.limit, self.waiting, self.bytes = folder, limit, dict[str, Tensor](), 0
        self.largest = 0
        self.written: list[tuple[Path, list[str], int]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        self.waiting[name] = tensor
        self.bytes += tensor.nbytes
        self.largest = max(self.largest, tensor.nbytes)
        # the next one may be as large, and is in memory before it is added
        if self.bytes + self.largest > self.limit:
            self._write()

    def _write(self) -> None:
        path = self.folder / f"model-{len(self.written) + 1:05d}.safetensors.part"
        save_tensors(path, self.waiting)
        self.written.append((path, list(self.waiting), self.bytes))
        self.waiting, self.bytes = {}, 0

    def close(self) -> None:
        if self.waiting:
            self._write()
        count = len(self.written)
        weight_map: dict[str, str] = {}
        for number, (path, names, _) in enumerate(self.written, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
            path.rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index: dict[str, Any] = {
                "metadata": {"total_size": sum(size for _, _, size in self.written)},
                "weight_map": weight_map,
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
