"""Where a model's tensors live between calls: idle models on the host, a reference swapped into the policy's place.

A tensor is moved by emptying its storage, never by rebinding it: mcore's parameters, gradients and optimizer shards are views into
flat buffers, and a view of an emptied and refilled storage is valid again.
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


@dataclass
class _Parked:
    storage: torch.UntypedStorage
    size: int
    copy: Tensor | None  # uint8 [size] on the host; None: contents are not kept


@dataclass
class Shelf:
    """A set of tensors that is in use, or parked on the host. Tensors may share storages.

    keep: False for tensors whose contents are void between uses (gradients); they come back as zeros.
    """

    find: Callable[[], Iterable[Tensor]]
    keep: bool = True
    parked: list[_Parked] = field(default_factory=list)

    @torch.no_grad()
    def park(self) -> None:
        if self.parked:
            return
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in self.find() if t.untyped_storage().size()}
        for storage in storages.values():
            self.parked.append(_Parked(storage, storage.size(), _to_host(storage) if self.keep else None))
            storage.resize_(0)

    @torch.no_grad()
    def restore(self) -> None:
        for item in self.parked:
            item.storage.resize_(item.size)
            whole = torch.empty(0, dtype=torch.uint8, device=item.storage.device).set_(item.storage)
            whole.zero_() if item.copy is None else whole.copy_(item.copy)
        self.parked = []


def _to_host(storage: torch.UntypedStorage) -> Tensor:
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
    return host.copy_(whole)


class Residency:
    """Keeps at most one offloaded model on the device: whoever is used next sends the idle one to the host.

    So several steps of one model in a row move nothing. weights: needed by every use; training: gradients and optimizer state.
    """

    _awake: ClassVar[weakref.WeakSet[Residency]] = weakref.WeakSet()  # one per process, as the device is

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
        for shelf in (self.weights, *self.training):  # fp32 master weights are the weights themselves: parked, and restored, with them
            shelf.park()
        Residency._awake.discard(self)


@dataclass(frozen=True)
class Snapshot:
    """What makes one model another in the same modules."""

    weights: list[Tensor]  # on the host
    scaling: ScalingState  # on the device; empty without delayed scaling


@torch.no_grad()
def host_copies(live: list[Tensor]) -> list[Tensor]:
    """Clones on the host, pinned where there is a device to copy back to."""
    return [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.device.type == "cuda").copy_(t) for t in live]


@contextmanager
def swapped(live: list[Tensor], other: list[Tensor]) -> Iterator[None]:
    """`live` holds the values of `other` inside, and its own again afterwards, whatever happened. No optimizer call inside.

    Raises ValueError when the shapes differ.
    """
    if [t.shape for t in live] != [t.shape for t in other]:
        raise ValueError("the models to swap are not laid out alike")
    with torch.no_grad():
        own = [t.clone() for t in live]
        for t, new in zip(live, other, strict=True):
            t.copy_(new)
    try:
        yield
    finally:
        with torch.no_grad():
            for t, old in zip(live, own, strict=True):
                t.copy_(old)
