"""recipes/model/ against the published config.json of each model; base recipes leave the
architecture open."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest

from gipo_megatron.recipe.files import Files
from gipo_megatron.recipe.source import MISSING, plain
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_config import architecture_from_config
from tests.recipe.helpers import RECIPES

SEVEN_B = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "initializer_range": 0.02,
}
# The published config.json of recipes/model/NAME's hub name.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama2_7b": {
        **SEVEN_B,
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "llama3_1_8b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "mistral_7b": {
        **SEVEN_B,
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32768,
    },
    "qwen2_5_7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
}


PUBLISHED["llama3_1_70b"] = PUBLISHED["llama3_1_8b"] | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_model_is_its_published_config(name: str) -> None:
    fragment = plain(Files(RECIPES).own(RECIPES / "model" / f"{name}.yaml"))["model"]
    assert fragment["hub"].count("/") == 1
    assert fragment["architecture"] == asdict(architecture_from_config(PUBLISHED[name], name))


def test_every_shipped_model_is_compared() -> None:
    assert {path.stem for path in (RECIPES / "model").glob("*.yaml")} == {
        *PUBLISHED,
        "tiny",
        "two_layers",
        "from_weights",
    }


def test_base_recipes_write_no_architecture() -> None:
    names = sorted(path.stem for path in (RECIPES / "base").glob("*.yaml"))
    for name in names:
        block = plain(Files(RECIPES).load(RECIPES / "base" / f"{name}.yaml"))["model"][
            "architecture"
        ]
        assert block == {f.name: MISSING for f in fields(Architecture)}
    assert {"gipo", "ppo", "reward_model", "sft"} <= set(names)
