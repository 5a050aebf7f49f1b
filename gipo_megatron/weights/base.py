"""The identity of the frozen model that adapters belong to: a fingerprint, and where it was."""

from __future__ import annotations

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
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted((*folder.rglob("*.safetensors"), *folder.rglob("*.distcp"))):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_BYTES, size // _PIECES)):
                file.seek(start)
                digest.update(file.read(_BYTES))
    return BaseMeta(digest.hexdigest(), str(folder.resolve()))
