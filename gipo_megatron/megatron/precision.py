"""Number formats: a recipe's dtype and FP8 recipe as fields of mcore's TransformerConfig."""

from __future__ import annotations

import importlib.util
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig

from gipo_megatron.errors import UserError
from gipo_megatron.specs import Parallel, Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # fp16 only for conversion: recipes refuse it
FP8_RECIPES = {"delayed": Fp8Recipe.delayed, "tensorwise": Fp8Recipe.tensorwise, "blockwise": Fp8Recipe.blockwise}
FP8_ROWS = 16  # sequence × batch must divide by this in an FP8 matrix product; a multiple of the length alone always does


def transformer_engine_usable() -> bool:
    """Transformer Engine is importable and there is a CUDA device to run it on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def torch_dtype(precision: Precision) -> torch.dtype:
    """Raises UserError for an unknown dtype."""
    if precision.dtype not in DTYPES:
        raise UserError(f"unknown precision {precision.dtype!r}", where="precision.dtype", fix=f"one of {', '.join(DTYPES)}")
    return DTYPES[precision.dtype]


def check(precision: Precision) -> None:
    """Raises UserError for an unknown name, for FP8 without bf16, and for FP8 where Transformer Engine or a GPU is missing."""
    torch_dtype(precision)
    if precision.fp8 == "none":
        return
    if precision.fp8 not in FP8_RECIPES:
        known = f"one of none, {', '.join(FP8_RECIPES)}"
        raise UserError(f"unknown FP8 recipe {precision.fp8!r}", where="precision.fp8", fix=known)
    if precision.dtype != "bf16":
        raise UserError(f"FP8 needs bf16 around it, not {precision.dtype}", where="precision.dtype", fix="set precision.dtype to bf16")
    if not transformer_engine_usable():
        missing = "no CUDA device" if not torch.cuda.is_available() else "Transformer Engine is not installed"
        fix = "set precision.fp8 to none, or run on a Hopper-class GPU with pip install 'gipo-megatron[gpu]'"
        raise UserError(f"precision.fp8 is {precision.fp8!r}, but {missing}", where="precision.fp8", fix=fix)


def config_fields(precision: Precision) -> dict[str, Any]:
    """Fields of TransformerConfig: one dtype for weights, activations and messages between stages; FP8 is e4m3 forward, e5m2 gradients."""
    dtype = torch_dtype(precision)
    fields: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype is torch.bfloat16}
    if precision.fp8 != "none":
        fields |= {"fp8": "hybrid", "fp8_recipe": FP8_RECIPES[precision.fp8]}
        if precision.fp8 == "delayed":
            fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields


def length_multiple(precision: Precision, parallel: Parallel) -> int:
    """What a micro-batch's padded length must divide by: the tensor size under sequence parallel, 16 in FP8 (per rank), else 1."""
    shards = parallel.tensor if parallel.sequence else 1
    return math.lcm(shards, FP8_ROWS * shards) if precision.fp8 != "none" else shards


def fp8_context(config: TransformerConfig) -> AbstractContextManager[Any]:
    """Transformer Engine's autocast for modules run outside a transformer block (the block enters its own); nothing without FP8."""
    return get_fp8_context(config)
