"""Where a model's tensors live between calls: idle models on the host, a reference swapped into the
policy's place.

A tensor is moved by emptying its storage, never by rebinding it: mcore's parameters, gradients and
optimizer shards are views into flat buffers, and a view of an emptied and refilled storage is valid
again.

Host buffers are pinned where there is a GPU, once, and kept: pinning 14 GB takes seconds. Copies
between them and the GPU do not block the host. They, the kernels before and after, and the memory
that is freed and given out again, are all in the order of one CUDA stream, and nothing on the host
reads a parked buffer, so nothing has to wait.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gipo_megatron.megatron.scaling import ScalingState

PIECE_BYTES = 2**20  # what is smaller is not cut further


def pieces(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Flat views that cover contiguous `tensors`, of a power of two of bytes each, but for rests
    below 1 MiB.

    torch rounds every pinned buffer up to a power of two: 4.1 GB in one piece would pin 8.
    """
    found = []
    for t in tensors:
        rest = t.view(-1)
        while rest.nbytes > PIECE_BYTES:
            size = 2 ** (rest.nbytes.bit_length() - 1) // rest.itemsize
            found.append(rest[:size])
            rest = rest[size:]
        if rest.nbytes:
            found.append(rest)
    return found


def _host_buffers(live: Iterable[Tensor]) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.device.type == "cuda") for t in live]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


@dataclass
class _Parked:
    storage: torch.UntypedStorage
    size: int
    copy: list[Tensor]  # the contents on the host, in pieces; []: not kept


@dataclass
class Shelf:
    """A set of tensors that is in use, or parked on the host. Tensors may share storages.

    keep: False for tensors whose contents are void between uses (gradients); they come back as
    zeros.
    """

    find: Callable[[], Iterable[Tensor]]
    keep: bool = True
    parked: list[_Parked] = field(default_factory=list)
    # by storage: the last park's, for the next one
    buffers: dict[int, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def park(self) -> None:
        if self.parked:
            return
        storages = {
            t.untyped_storage()._cdata: t.untyped_storage()
            for t in self.find()
            if t.untyped_storage().size()
        }
        self.parked = [
            _Parked(s, s.size(), self._copied(key, s) if self.keep else [])
            for key, s in storages.items()
        ]
        self.buffers = {key: item.copy for key, item in zip(storages, self.parked, strict=True)}
        for storage in storages.values():
            storage.resize_(0)

    def _copied(self, key: int, storage: torch.UntypedStorage) -> list[Tensor]:
        live, host = pieces([_bytes(storage)]), self.buffers.get(key, [])
        if [t.nbytes for t in host] != [t.nbytes for t in live]:
            host = _host_buffers(live)
        _copy(host, live)
        return host

    @torch.no_grad()
    def restore(self) -> None:
        for item in self.parked:
            item.storage.resize_(item.size)
            whole = _bytes(item.storage)
            if self.keep:
                _copy(pieces([whole]), item.copy)
            else:
                whole.zero_()
        self.parked = []


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """uint8 [size]: the storage itself."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Residency:
    """Keeps at most one offloaded model on the device: whoever is used next sends the idle one to
    the host.

    So several steps of one model in a row move nothing. weights: needed by every use; training:
    gradients and optimizer state.
    """

    # one per process, as the device is
    _awake: ClassVar[weakref.WeakSet[Residency]] = weakref.WeakSet()

    def __init__(self, offload: str, weights: Shelf, training: tuple[Shelf, ...]) -> None:
        if offload not in ("none", "cpu"):
            raise ValueError(f"unknown offload {offload!r}; none or cpu")
        self.offload, self.weights, self.training = offload, weights, training
        self._users = 0
        if offload == "cpu":
            self._park()

    @contextmanager
    def use(self, training: bool = False) -> Iterator[None]:
        """The model is on the device inside; nested uses are fine."""
        if self.offload == "cpu":
            for other in [r for r in Residency._awake if r is not self and not r._users]:
                other._park()
            Residency._awake.add(self)
            for shelf in (self.weights, *(self.training if training else ())):
                shelf.restore()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    @staticmethod
    def make_room() -> None:
        """Idle offloaded models go to the host, before another one is built."""
        for other in [r for r in Residency._awake if not r._users]:
            other._park()

    def _park(self) -> None:
        # fp32 master weights are the weights themselves: parked, and restored, with them
        for shelf in (self.weights, *self.training):
            shelf.park()
        Residency._awake.discard(self)


@dataclass(frozen=True)
class Snapshot:
    """What makes one model another in the same modules."""

    weights: list[Tensor]  # on the host, in pieces
    scaling: ScalingState  # on the device; empty without delayed scaling


@torch.no_grad()
def host_copies(live: list[Tensor]) -> list[Tensor]:
    """Copies on the host, in `pieces`, pinned where there is a device to copy back to."""
    parts = pieces(live)
    return [host.copy_(part) for host, part in zip(_host_buffers(parts), parts, strict=True)]


@contextmanager
def swapped(live: list[Tensor], other: list[Tensor]) -> Iterator[None]:
    """`live` holds the values of `other` (tensors, or their `host_copies`) inside, and its own
    again afterwards, whatever happened.

    No optimizer call inside. Raises ValueError when the sizes differ.
    """
    live, other = pieces(live), pieces(other)
    if [t.shape for t in live] != [t.shape for t in other]:
        raise ValueError("the models to swap are not laid out alike")
    with torch.no_grad():
        own = [t.clone() for t in live]
        _copy(live, other)
    try:
        yield
    finally:
        with torch.no_grad():
            _copy(live, own)
