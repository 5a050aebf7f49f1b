"""A tiny Llama that the fake server and transformers share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder: config.json alone."""
    path = tmp_path_factory.mktemp("tiny_llama")
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


def hf_model(folder: Path, seed: int) -> Any:
    """transformers' model with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def named(model: Any) -> dict[str, torch.Tensor]:
    """The tensors as a trainer exports them: a tied output weight once."""
    return {name: p.detach() for name, p in model.named_parameters()}
