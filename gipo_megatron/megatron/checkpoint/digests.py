"""Digests of a checkpoint's files. They find damage that leaves a file's size as it is."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import xxhash

from gipo_megatron.errors import UserError
from gipo_megatron.files import inside
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.weights.checkpoints import OTHER, CheckpointMeta

_PIECE = 2**24  # bytes
_TENSORS = re.compile(r"__(\d+)_\d+\.distcp")  # of rank \1


def digests(folder: Path, mesh: Mesh) -> dict[str, str]:
    """Return {path in the folder: digest} of the files of a folder that all ranks have written.
    Collective."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    parts = mesh.everyone({name: _digest(folder / name) for name in _mine(names, mesh)})
    return dict(sorted(item for part in parts for item in part.items()))


def check_digests(
    path: Path, meta: CheckpointMeta, mesh: Mesh, unread: Collection[str] = ()
) -> None:
    """Compare the files of a checkpoint, but for the roles `unread`, with meta.json. Collective.

    Raises UserError, the same on every rank, for a file with other content. The first checkpoints
    have no digests, and pass.
    """
    written = meta.digests or {}
    names = [name for name in written if name.split("/")[0] not in unread]
    files = {name: inside(path, name, str(path / "meta.json")) for name in _mine(names, mesh)}
    other = [name for name, file in files.items() if _digest(file) != written[name]]
    if found := sorted(name for part in mesh.everyone(other) for name in part):
        what = f"damaged checkpoint: {found[0]} has other content than was written"
        raise UserError(what, where=str(path), fix=OTHER)


def _mine(names: Collection[str], mesh: Mesh) -> list[str]:
    """Return the files that this rank reads: the tensors of the rank with its number, which may
    still be in its machine's memory; rank 0 reads all else."""
    tensors = {name: _TENSORS.fullmatch(Path(name).name) for name in names}
    readers = {name: int(of[1]) % mesh.world if of else 0 for name, of in tensors.items()}
    return [name for name in names if readers[name] == mesh.rank]


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_64()
    with file.open("rb") as content:
        while piece := content.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
