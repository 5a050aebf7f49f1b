"""Number formats: a recipe's dtype and FP8 recipe as fields of mcore's TransformerConfig.

FP8 is for the matrix products of the transformer layers in the training forward and backward: mcore
enters Transformer Engine's autocast around the layers only, so embeddings, the output layer, heads
and log-probs stay in bf16 or fp32. Generation (decode.py) reads the bf16 weights and never enters
it.

tensorwise and blockwise take each tensor's scale from the tensor itself. `delayed` takes it from
the largest values of earlier passes, which is state beside the weights: scaling.py.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions.transformer_engine import HAVE_TE

from gipo_megatron import capabilities
from gipo_megatron.errors import UserError
from gipo_megatron.specs import Architecture, Parallel, Precision

# fp16 only for conversion: recipes refuse it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8_RECIPES = {
    "delayed": Fp8Recipe.delayed,
    "tensorwise": Fp8Recipe.tensorwise,
    "blockwise": Fp8Recipe.blockwise,
}
# sequence × batch must divide by this in an FP8 matrix product; a multiple of the length alone
# always does
FP8_ROWS = 16


def transformer_engine_usable() -> bool:
    """Transformer Engine is installed and there is a CUDA device to run it on.

    Raises UserError where it is installed there and does not import: Megatron-Core would build its
    layers from mocks.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return False
    if not HAVE_TE:
        failure = capabilities.transformer_engine_failure()
        raise capabilities.broken_transformer_engine(
            failure.reason if failure else "Megatron-Core could not import it"
        )
    return True


def torch_dtype(precision: Precision) -> torch.dtype:
    """Raises UserError for an unknown dtype."""
    if precision.dtype not in DTYPES:
        raise UserError(
            f"unknown precision {precision.dtype!r}",
            where="precision.dtype",
            fix=f"one of {', '.join(DTYPES)}",
        )
    return DTYPES[precision.dtype]


def check(precision: Precision, here: capabilities.Capabilities | None = None) -> None:
    """Raises UserError for an unknown name, for FP8 without bf16, and for FP8 that this machine
    (`here`: another) cannot run.

    On this machine also for a Transformer Engine that does not import, where layers in bf16 would
    be made of it.
    """
    torch_dtype(precision)
    if here is None and precision.dtype == "bf16":
        transformer_engine_usable()
    if precision.fp8 == "none":
        return
    if precision.fp8 not in FP8_RECIPES:
        known = f"one of none, {', '.join(FP8_RECIPES)}"
        raise UserError(f"unknown FP8 recipe {precision.fp8!r}", where="precision.fp8", fix=known)
    if precision.dtype != "bf16":
        raise UserError(
            f"FP8 needs bf16 around it, not {precision.dtype}",
            where="precision.dtype",
            fix="set precision.dtype to bf16",
        )
    capabilities.check_fp8(precision.fp8, here or capabilities.probe())


def check_widths(precision: Precision, architecture: Architecture, parallel: Parallel) -> None:
    """Raises UserError when a weight of one tensor rank has a side that is no multiple of 16, as
    Transformer Engine wants it."""
    if precision.fp8 == "none":
        return
    a, tensor = architecture, parallel.tensor
    for size, what in (
        (a.hidden_size, "hidden_size"),
        (a.ffn_hidden_size // tensor, f"ffn_hidden_size {a.ffn_hidden_size} / tensor {tensor}"),
        (
            a.num_heads * a.head_dim // tensor,
            f"num_heads {a.num_heads} × head_dim {a.head_dim} / tensor {tensor}",
        ),
        (
            (a.num_heads + 2 * a.num_kv_heads) * a.head_dim // tensor,
            f"query, key and value rows / tensor {tensor}",
        ),
    ):
        if size % FP8_ROWS:
            fix = "set precision.fp8 to none, or another parallel.tensor"
            raise UserError(
                f"FP8 needs widths that divide by {FP8_ROWS}; {what} is {size}",
                where="precision.fp8",
                fix=fix,
            )


def config_fields(precision: Precision) -> dict[str, Any]:
    """Fields of TransformerConfig: one dtype for weights, activations and messages between stages;
    FP8 is e4m3 forward, e5m2 gradients."""
    dtype = torch_dtype(precision)
    fields: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
    }
    # on the CPU it would only change the order of the embedding's sums
    if precision.deterministic and torch.cuda.is_available():
        fields["deterministic_mode"] = True
    if precision.fp8 != "none":
        fields |= {"fp8": "hybrid", "fp8_recipe": FP8_RECIPES[precision.fp8]}
        # FP8 copies of the weights are made anew in each micro-batch: none to go stale in a swap,
        # none left behind by a parked model
        fields["disable_parameter_transpose_cache"] = True
        if precision.fp8 == "delayed":
            fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields


def length_multiple(precision: Precision, parallel: Parallel) -> int:
    """What a micro-batch's padded length must divide by: the tensor size under sequence parallel,
    16 in FP8 (per rank), else 1."""
    shards = parallel.tensor if parallel.sequence else 1
    return math.lcm(shards, FP8_ROWS * shards) if precision.fp8 != "none" else shards
