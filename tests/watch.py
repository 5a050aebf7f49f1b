"""Observers of torch's operations: values that Python reads, and bytes that are allocated."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    """Count of reads of a tensor's value by Python: on a GPU each waits for all work before it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes held at once by tensors made in the block; `largest`: those of one.
    Temporaries inside one operation are not counted. Meta tensors count as if they had memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if (
                isinstance(x, Tensor)
                and x.untyped_storage()._cdata not in before | self.sizes.keys()
            ):
                key = x.untyped_storage()._cdata
                self.sizes[key] = x.untyped_storage().nbytes()
                self.largest = max(self.largest, self.sizes[key])
                weakref.finalize(x.untyped_storage(), self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out
