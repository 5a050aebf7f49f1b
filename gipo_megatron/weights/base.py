"""The identity of the frozen model that adapters belong to: a fingerprint, and where it was."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

_ENDS = 2**20  # bytes of a file's beginning and end that are read: names, shapes and some values
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
    """Return the identity of the weights in a folder, from each file's size, beginning and end: all
    of 14 GB would take a minute, and names and shapes are equal for all fine-tunes of a model."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted((*folder.rglob("*.safetensors"), *folder.rglob("*.distcp"))):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read(_ENDS))
    return BaseMeta(digest.hexdigest(), str(folder.resolve()))
