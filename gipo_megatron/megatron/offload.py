"""Offload: idle models on the host, and a reference swapped into the policy's place.

A tensor is moved by emptying its storage, never by rebinding it. mcore's parameters, gradients and
optimizer shards are views of flat buffers, and a view of a storage is valid again after a refill.

With a GPU the host buffers are pinned once and kept, because pinning 14 GB takes seconds. Copies do
not block the host. The copies, the kernels around them and the reuse of freed memory are all in the
order of one CUDA stream, and nothing on the host reads a parked buffer, so nothing has to wait.
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

PIECE_BYTES = 2**20  # smaller pieces are not cut further


def pieces(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return flat views that cover contiguous `tensors`. Each has a power of two of bytes, except
    for rests below 1 MiB.

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
    copy: list[Tensor]  # the contents on the host, in pieces; [] where they are not kept


@dataclass
class Shelf:
    """A set of tensors that is in use, or parked on the host. Tensors may share storages.

    keep: False for tensors whose contents are not needed between uses (gradients); they return as
    zeros.
    """

    find: Callable[[], Iterable[Tensor]]
    keep: bool = True
    parked: list[_Parked] = field(default_factory=list)
    # host buffers of each storage, reused every time
    buffers: dict[int, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def park(self) -> None:
        if self.parked:
            return
        found = [t.untyped_storage() for t in self.find()]
        storages = {storage._cdata: storage for storage in found if storage.size()}
        copies = {key: self._copied(key, s) if self.keep else [] for key, s in storages.items()}
        self.parked = [_Parked(s, s.size(), copies[key]) for key, s in storages.items()]
        self.buffers = copies
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
    """Return the storage as a tensor, uint8 [size]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Residency:
    """Keeps at most one offloaded model on the device: using a model sends the idle ones to the
    host, and several uses of one model in a row move nothing.

    weights: needed by every use; training: gradients and optimizer state.
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
        """Hold the model on the device. Uses may be nested."""
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
        """Send idle offloaded models to the host, before another one is built."""
        for other in [r for r in Residency._awake if not r._users]:
            other._park()

    def _park(self) -> None:
        # an fp32 model's master weights are its weights, so both are parked and restored together
        for shelf in (self.weights, *self.training):
            shelf.park()
        Residency._awake.discard(self)


@dataclass(frozen=True)
class Snapshot:
    """The values of one model, to be swapped into the modules of another."""

    weights: list[Tensor]  # on the host, in pieces
    scaling: ScalingState  # on the device; empty without delayed scaling


@torch.no_grad()
def host_copies(live: list[Tensor]) -> list[Tensor]:
    """Return copies on the host, in `pieces`, pinned for tensors of a GPU."""
    parts = pieces(live)
    return [host.copy_(part) for host, part in zip(_host_buffers(parts), parts, strict=True)]


@contextmanager
def swapped(live: list[Tensor], other: list[Tensor]) -> Iterator[None]:
    """Give `live` the values of `other` (tensors, or their `host_copies`) inside, and its own again
    afterwards, also after an error.

    Call no optimizer inside. Raises ValueError when the sizes differ.
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
