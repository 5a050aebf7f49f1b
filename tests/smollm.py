"""What recipes/smollm need on a machine without the model: its config.json, from which they take
their architecture."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOME = "runs/smollm2"  # where the recipes expect the model
# As published with HuggingFaceTB/SmolLM2-135M-Instruct.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}


@contextlib.contextmanager
def beside_the_model() -> Iterator[None]:
    """In a current folder that holds the model's config.json and nothing else."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path(HOME).mkdir(parents=True)
        (Path(HOME) / "config.json").write_text(json.dumps(CONFIG))
        yield
