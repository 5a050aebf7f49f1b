"""Number formats: a recipe's dtype and FP8 recipe as fields of mcore's TransformerConfig.

FP8 is for the matrix products of the transformer layers in training: mcore enters Transformer
Engine's autocast around the layers only, so embeddings, the output layer, heads and log-probs stay
in bf16 or fp32. Generation (decode.py) uses the bf16 weights.

tensorwise and blockwise take each tensor's scale from the tensor itself. `delayed` takes it from
the largest values of earlier passes, a state beside the weights (scaling.py).
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

# fp16 is for conversion only; recipes refuse it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8_RECIPES = {
    "delayed": Fp8Recipe.delayed,
    "tensorwise": Fp8Recipe.tensorwise,
    "blockwise": Fp8Recipe.blockwise,
}
# divides sequence × batch in an FP8 matrix product; here it divides the length already
FP8_ROWS = 16


def transformer_engine_usable() -> bool:
    """Check that Transformer Engine is installed, and a CUDA device present.

    Raises UserError where both are there but its import fails: Megatron-Core would build its layers
    from mocks.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return False
    if not HAVE_TE:
        failure = capabilities.transformer_engine_failure()
        reason = failure.reason if failure else "Megatron-Core could not import it"
        raise capabilities.broken_transformer_engine(reason)
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
    """Raises UserError for an unknown name, for FP8 without bf16, and for FP8 that this machine, or
    the machine `here`, cannot run.

    On this machine also for bf16 with a Transformer Engine whose import fails.
    """
    torch_dtype(precision)
    if here is None and precision.dtype == "bf16":
        transformer_engine_usable()
    if precision.fp8 == "none":
        return
    if precision.fp8 not in FP8_RECIPES:
        raise UserError(
            f"unknown FP8 recipe {precision.fp8!r}",
            where="precision.fp8",
            fix=f"one of none, {', '.join(FP8_RECIPES)}",
        )
    if precision.dtype != "bf16":
        raise UserError(
            f"FP8 needs bf16 around it, not {precision.dtype}",
            where="precision.dtype",
            fix="set precision.dtype to bf16",
        )
    capabilities.check_fp8(precision.fp8, here or capabilities.probe())


def check_widths(precision: Precision, architecture: Architecture, parallel: Parallel) -> None:
    """Raises UserError when a side of a tensor rank's weight is no multiple of 16, as Transformer
    Engine requires."""
    if precision.fp8 == "none":
        return
    a, tensor = architecture, parallel.tensor
    queries, rows = a.num_heads * a.head_dim, (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    for size, what in (
        (a.hidden_size, "hidden_size"),
        (a.ffn_hidden_size // tensor, f"ffn_hidden_size {a.ffn_hidden_size} / tensor {tensor}"),
        (queries // tensor, f"num_heads {a.num_heads} × head_dim {a.head_dim} / tensor {tensor}"),
        (rows // tensor, f"query, key and value rows / tensor {tensor}"),
    ):
        if size % FP8_ROWS:
            raise UserError(
                f"FP8 needs widths that divide by {FP8_ROWS}; {what} is {size}",
                where="precision.fp8",
                fix="set precision.fp8 to none, or another parallel.tensor",
            )


def config_fields(precision: Precision) -> dict[str, Any]:
    """Return fields of TransformerConfig: one dtype for weights, activations and messages between
    stages; FP8 is e4m3 forward, e5m2 for gradients."""
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
        # Every micro-batch makes new FP8 copies of the weights, so that none is outdated after a
        # swap and none is left of a parked model.
        fields["disable_parameter_transpose_cache"] = True
        if precision.fp8 == "delayed":
            fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields


def length_multiple(precision: Precision, parallel: Parallel) -> int:
    """Return the number that divides a micro-batch's padded length: the tensor size under sequence
    parallelism, 16 in FP8 (per rank), else 1."""
    shards = parallel.tensor if parallel.sequence else 1
    return math.lcm(shards, FP8_ROWS * shards) if precision.fp8 != "none" else shards
