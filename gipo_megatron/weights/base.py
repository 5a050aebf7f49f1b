"""The identity of the frozen model that adapters belong to: a fingerprint, and where it was."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

_PIECES, _BYTES = 1024, 4096  # of a file that are read, evenly spaced: some of every large matrix
_RANDOM = "random/"


@dataclass(frozen=True)
class BaseMeta:
    """The identity of a frozen model: equal fingerprints are one model, wherever it is."""

    fingerprint: str  # of a folder's files, or random/SEED
    source: str = field(default="", compare=False)  # the folder, found from any directory

    @property
    def seed(self) -> int | None:
        """The seed of random weights; None for those of a folder."""
        if not self.fingerprint.startswith(_RANDOM):
            return None
        return int(self.fingerprint.removeprefix(_RANDOM))


def random_base(seed: int) -> BaseMeta:
    return BaseMeta(f"{_RANDOM}{seed}")


def base_at(folder: Path) -> BaseMeta:
    """Return the identity of the weights in a folder, from each file's name, size and pieces of it:
    all of 14 GB would take a minute, and names and shapes are equal for all fine-tunes of a
    model."""
    files = sorted((*folder.rglob("*.safetensors"), *folder.rglob("*.distcp")))
    stats = ((path, path.stat()) for path in files)
    written = tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
    return BaseMeta(_fingerprint(folder, written), str(folder.resolve()))


@functools.cache
def _fingerprint(folder: Path, written: tuple[tuple[Path, int, int], ...]) -> str:
    """Read the files once for all roles that share a base. `written`, their sizes and times, makes
    a changed file another call."""
    digest = hashlib.blake2b(digest_size=16)
    for path, size, _ in written:
        digest.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_BYTES, size // _PIECES)):
                file.seek(start)
                digest.update(file.read(_BYTES))
    return digest.hexdigest()
