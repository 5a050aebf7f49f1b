from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from gipo_megatron.errors import UserError
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_config import (
    architecture_from_config,
    architecture_from_hf,
    config_for,
)
from tests.parity.families import COMMON

LLAMA = {"model_type": "llama", **COMMON}


def test_transformers_4_and_5_say_the_same() -> None:
    block = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    four = architecture_from_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": block}, "")
    five = architecture_from_config({**LLAMA, "rope_parameters": {**block, "rope_theta": 5e5}}, "")
    assert (
        four == five == Architecture(4, 32, 48, 4, 2, 8, 250, 64, rope_base=5e5, rope_scaling=block)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not built"),
        (
            {"attention_bias": True, "mlp_bias": True},
            "not built: attention_bias: True, mlp_bias: True",
        ),
        ({"hidden_act": "gelu"}, "not built: hidden_act: gelu"),
        (
            {"model_type": "qwen2", "use_sliding_window": True},
            "not built: use_sliding_window: True",
        ),
    ],
)
def test_what_is_not_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        architecture_from_config({**LLAMA, **changes}, "config.json")


def test_missing_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks hidden_size, rms_norm_eps"):
        architecture_from_config(
            {k: v for k, v in LLAMA.items() if k not in ("hidden_size", "rms_norm_eps")}, ""
        )
    with pytest.raises(UserError, match=r"cannot read config\.json"):
        architecture_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read config\.json"):
        architecture_from_hf(tmp_path)


def test_a_sliding_window_bounds_the_length() -> None:
    assert (
        architecture_from_config(
            {**LLAMA, "model_type": "mistral", "sliding_window": 16}, ""
        ).max_positions
        == 16
    )
    assert (
        architecture_from_config(
            {**LLAMA, "model_type": "mistral", "sliding_window": None}, ""
        ).max_positions
        == 64
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_config_for_is_read_by_transformers(family: str, tmp_path: Path) -> None:
    bias, norm = family == "qwen2", family == "qwen3"
    a = Architecture(
        4,
        32,
        48,
        4,
        2,
        16,
        250,
        64,
        rope_base=5e5,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        qkv_bias=bias,
        qk_norm=norm,
    )
    (tmp_path / "config.json").write_text(
        json.dumps(config_for(a, "bfloat16", tokens={"eos_token_id": 3}))
    )
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == family and config.eos_token_id == 3
    assert config.rope_parameters["rope_theta"] == 5e5 and config.rope_parameters["factor"] == 2.0
    assert architecture_from_hf(tmp_path) == a


def test_no_family_has_bias_and_norm() -> None:
    with pytest.raises(UserError, match="both QKV bias and QK-norm"):
        config_for(Architecture(1, 8, 8, 2, 2, 4, 16, 8, qkv_bias=True, qk_norm=True), "float32")
