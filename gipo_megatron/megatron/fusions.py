"""One kernel on a GPU where Megatron-Core has several: RoPE, and the sum of weight gradients over
micro-batches. A CPU runs the same functions uncompiled.

A residual sum and the RMSNorm after it stay two kernels (docs/gpu.md, "Fused kernels").
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor

# the extension of apex that Megatron-Core imports by this name
EXTENSION = "fused_weight_gradient_mlp_cuda"
TORCH = "2.11"  # that `add_weight_gradient` needs on a GPU


def rope_angles(frequencies: Tensor, length: int) -> Tensor:
    """Return position · frequency, radians, fp32 [length, d / 2], on the device of `frequencies`
    [d / 2]."""
    positions = torch.arange(length, device=frequencies.device, dtype=torch.float32)
    return torch.outer(positions, frequencies)


class Rotation:
    """RoPE of all layers of a model: cosines and sines are computed once for each dtype, and again
    for a longer sequence.

    frequencies: fp32 [d / 2], radians a token.
    """

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query [s, b, heads, d] and key [s, b, groups, d]; row s is position s.

        Batch and heads are one axis of the compiled function: it has no other graph for b = 1.
        """
        kind, length = (query.device, query.dtype), len(query)
        if kind not in self._tables or len(self._tables[kind][0]) < length:
            with torch.inference_mode(False):  # a later training pass reads the same tables
                angles = rope_angles(self.frequencies.to(query.device), length)[:, None]
                self._tables[kind] = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        cos, sin = self._tables[kind]
        q, k = rotate(query.flatten(1, 2), key.flatten(1, 2), cos[:length], sin[:length])
        return q.view_as(query), k.view_as(key)


def rotate_uncompiled(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn each pair (x_i, x_{i + d/2}) by its angle; query and key [s, n, d], cos and sin [s, 1,
    d / 2]:

    y_i = x_i cos - x_{i + d/2} sin;  y_{i + d/2} = x_{i + d/2} cos + x_i sin
    """
    return _turn(query, cos, sin), _turn(key, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


# beyond torch's limit of eight graphs it runs uncompiled
rotate = (
    torch.compile(rotate_uncompiled, dynamic=True)
    if torch.cuda.is_available()
    else rotate_uncompiled
)


def add_weight_gradient(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    """total += gradientᵀ x, in place: x [n, in], gradient of the output [n, out], total [out, in],
    which is fp32 for bf16 inputs.

    Without it a micro-batch writes the product in bf16 and adds it in a second pass, of 10 bytes a
    parameter, after one more rounding.
    """
    if gradient.is_cuda and gradient.dtype != total.dtype:
        torch.addmm(total, gradient.t(), x, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(gradient.t().to(total.dtype), x.to(total.dtype))


def provide_extension() -> None:
    """Make `add_weight_gradient` importable under the extension's name, where there is a GPU and no
    extension. Call it before Megatron-Core is imported.

    Older torch cannot add a product of bf16 matrices to an fp32 matrix (pytorch pull request
    167931), and is left without it.
    """
    if not torch.cuda.is_available() or torch.__version__ < TORCH:
        return
    if EXTENSION in sys.modules or importlib.util.find_spec(EXTENSION) is not None:
        return
    module = ModuleType(EXTENSION)
    for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):  # by the sum's dtype
        setattr(module, name, add_weight_gradient)
    sys.modules[EXTENSION] = module


def weight_gradients_fused() -> bool:
    """Check that Megatron-Core has the extension, or what `provide_extension` put in its place."""
    return torch.cuda.is_available() and EXTENSION in sys.modules
