"""`torch` and `Tensor` for the modules that a recipe command imports.

A recipe is read and checked without a tensor, and the import of torch takes longer than all the
rest. What is taken from here imports torch when it is first used, in a computation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Tensor", "torch"]

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _Torch:
        """The module torch, imported when one of its attributes is read."""

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    class _TensorType(type):
        def __instancecheck__(cls, item: object) -> bool:
            return isinstance(item, torch.Tensor)

    class Tensor(metaclass=_TensorType):
        """torch.Tensor, for annotations and isinstance."""

    torch = _Torch()
