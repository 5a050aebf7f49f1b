"""Tiny models of every family with unequal sizes everywhere, as transformers writes them, and what
two ranks make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel, Precision
from gipo_megatron.weights.checkpoints import CheckpointMeta
from gipo_megatron.weights.hf_config import architecture_from_hf

SIZES = {  # heads ≠ kv heads ≠ layers, head_dim ≠ hidden / heads, an odd vocabulary
    "vocab_size": 261,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"tie_word_embeddings": False, "bos_token_id": 257, "eos_token_id": 258}),
    "llama3_tied": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "eos_token_id": [258, 256]},
    ),
    "mistral": ("mistral", {"sliding_window": 48}),
    "mistral_tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama_scorer": ("llama", {"num_labels": 1, "pad_token_id": 256}),
    "qwen2_scorer": ("qwen2", {"num_labels": 1, "pad_token_id": 256, "tie_word_embeddings": True}),
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
LAYOUTS = {
    "tp2": Parallel(tensor=2),
    "pp2": Parallel(pipeline=2),
    "pp2_vpp3": Parallel(pipeline=2, virtual_pipeline=3),
}


def write_hf(folder: Path, name: str, dtype: str = "float32", **changes: Any) -> Path:
    """A Hugging Face folder in several shards, weights far from their defaults (norms and biases
    too)."""
    kind, settings = FAMILIES[name]
    config = AutoConfig.for_model(kind, **{**SIZES, **settings, **changes})
    cls = AutoModelForSequenceClassification if name.endswith("scorer") else AutoModelForCausalLM
    with torch.random.fork_rng():
        model = cls.from_config(config, dtype=getattr(torch, dtype))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.1 * noise if "norm" in key else 0.2 * noise)
    model.save_pretrained(folder, max_shard_size="30KB")
    byte_tokenizer().save(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, through safetensors alone."""
    return {
        name: t
        for file in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == (b := other[k]).dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for k, a in one.items()
    )


def layout_checkpoints(out: Path, mesh: Mesh) -> list[str]:
    """On two ranks: every family in both dtypes from OUT/<name>/hf, saved as OUT/<name>/<layout>.
    Returns what was written."""
    written = []
    cases = [(name, dtype) for name in FAMILIES for dtype in DTYPES]
    for name, dtype in cases:
        if mesh.is_main:
            write_hf(out / f"{name}_{dtype}" / "hf", name, dtype)
    mesh.barrier()
    for layout, parallel in LAYOUTS.items():
        mesh = Mesh.create(parallel, seed=1)
        for name, dtype in cases:
            folder = out / f"{name}_{dtype}"
            role = "reward" if name.endswith("scorer") else "actor"
            hf = folder / "hf"
            engine = build_engine(
                role, mesh, architecture_from_hf(hf), Precision(DTYPES[dtype]), load=str(hf)
            )
            checkpoint.write(
                folder / layout,
                {role: engine},
                mesh,
                CheckpointMeta(3, recipe="r", commit="c"),
                extra_files=lambda work: byte_tokenizer().save(work / "tokenizer"),
            )
            written.append(f"{name}_{dtype}/{layout}")
    return written
