from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import precision
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import transformer_config
from gipo_megatron.specs import Parallel, Precision
from tests.parity.tiny import ARCHITECTURE


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Precision("fp32"), {"params_dtype": torch.float32, "pipeline_dtype": torch.float32, "bf16": False}),
        (Precision("bf16"), {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}),
    ],
)
def test_dtype_fields(recipe: Precision, expected: dict) -> None:
    assert precision.config_fields(recipe) == expected


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise"])
def test_fp8_fields_are_accepted_by_the_transformer_config(name: str) -> None:
    fields = precision.config_fields(Precision("bf16", name))
    assert fields["fp8"] == "hybrid" and fields["fp8_recipe"].value == name
    assert ("fp8_amax_history_len" in fields) == (name == "delayed")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Precision("int8"), "unknown precision 'int8'"),
        (Precision("bf16", "mxfp8"), "unknown FP8 recipe 'mxfp8'"),
        (Precision("fp32", "delayed"), "FP8 needs bf16"),
    ],
)
def test_mistakes_are_told(recipe: Precision, words: str) -> None:
    with pytest.raises(UserError, match=words):
        precision.check(recipe)


@pytest.mark.skipif(precision.transformer_engine_usable(), reason="Transformer Engine is here")
def test_fp8_without_a_gpu_is_a_user_error() -> None:
    with pytest.raises(UserError) as error:
        precision.check(Precision("bf16", "blockwise"))
    assert "precision.fp8" in str(error.value) and "none" in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "parallel", "multiple"),
    [
        (Precision("bf16"), Parallel(tensor=4), 1),
        (Precision("bf16"), Parallel(tensor=4, sequence=True), 4),
        (Precision("bf16", "delayed"), Parallel(tensor=4), 16),
        (Precision("bf16", "delayed"), Parallel(tensor=4, sequence=True), 64),
    ],
)
def test_length_multiple(recipe: Precision, parallel: Parallel, multiple: int) -> None:
    assert precision.length_multiple(recipe, parallel) == multiple


def test_no_context_without_fp8(mesh: Mesh) -> None:
    assert isinstance(precision.fp8_context(transformer_config(ARCHITECTURE, Parallel(), Precision("bf16"))), nullcontext)
