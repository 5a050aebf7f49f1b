"""Reading a role's folder as data alone.

torch stores the index of a folder (.metadata) as a pickle, which can run any code, and reads it
without a check; so it reads all that is no tensor (mcore's own settings). Here an index is made of
the few classes below, and torch reads the rest with weights_only.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException, filesystem, metadata

from gipo_megatron.errors import UserError, library_errors
from gipo_megatron.files import inside
from gipo_megatron.weights.checkpoints import OTHER

_CLASSES: tuple[Any, ...] = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
    torch.serialization._get_layout,  # of a name
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(found.__module__, found.__qualname__): found for found in _CLASSES},
    **{(module, "PosixPath"): PosixPath for module in ("pathlib", "pathlib._local")},
}
# in torch's error about a class or function that is no data, and in the one below
_GLOBAL = re.compile(r"GLOBAL (\S+)")


class _IndexReader(pickle.Unpickler):
    """Finds the names of _ALLOWED, of data types, and of no other object.

    Source: https://docs.python.org/3/library/pickle.html#restricting-globals
    """

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _ALLOWED[module, name]


def _member(kind: Any, name: str) -> Any:
    """Return a memory format by its name: Python 3.11 stores the member of an Enum as a getattr."""
    if kind is not metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"GLOBAL builtins.getattr of {kind!r}")
    return kind[name]


def read_index(folder: Path) -> metadata.Metadata:
    """Return the index of a role's folder. No code can run from it.

    Raises UserError for an index that holds more than data, that names a file outside of the
    folder, or that cannot be read.
    """
    file = folder / ".metadata"
    with _data_alone(file), library_errors("cannot read the file", where=str(file), fix=OTHER):
        with file.open("rb") as content:
            index = _IndexReader(content).load()
        for name in sorted({part.relative_path for part in index.storage_data.values()}):
            inside(folder, name, str(file))
    return index


def read_state(folder: Path) -> dict[str, Any]:
    """Return the run's own state in a checkpoint: dicts, numbers, strings and tensors.

    Raises UserError where it holds more, or cannot be read.
    """
    file = folder / "state.pt"
    with _data_alone(file), library_errors("cannot read the file", where=str(file), fix=OTHER):
        return torch.load(file, weights_only=True, map_location="cpu")


def load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what mcore reads of a role's folder. Collective.

    Raises UserError as `read_index` does, and where another part holds more than data.
    """
    read_index(folder)
    with _data_alone(folder), patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}):
        # each torch.load reads weights alone, also where its caller or the user sets otherwise
        os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
        return dist_checkpointing.load(wanted, str(folder))


@contextmanager
def _data_alone(where: Path) -> Iterator[None]:
    """Raise UserError for a pickle with a class or function that is no data; of several ranks'
    errors, which torch wraps, only the first."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        first = next((each for each, _ in getattr(error, "failures", {}).values()), error)
        named = _GLOBAL.search(f"{first} {first.__cause__}")
        if named is None:
            raise first from first.__cause__
        raise UserError(
            f"a pickle names {named[1][:100]}, which is no data: reading it could run code",
            where=str(where),
            fix="do not use this checkpoint: no run of this project writes such a file",
        ) from None
