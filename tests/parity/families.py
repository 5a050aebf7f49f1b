"""Tiny models of every Hugging Face family that is supported, and how to run Megatron's chunks by
hand at any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel

VOCAB = 250  # not a multiple of 64: padded in Megatron
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # short, so that all three regimes of wavelengths occur
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama3_tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama_linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
}
LAYOUTS = {
    "tensor": Parallel(tensor=2),
    "tensor_sequence": Parallel(tensor=2, sequence=True),
    "pipeline": Parallel(pipeline=2),
    "interleaved": Parallel(pipeline=2, virtual_pipeline=2),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hf_model(name: str) -> PreTrainedModel:
    """Weights far from their defaults (norms and biases too), from one generator."""
    kind, settings = FAMILIES[name]
    config = AutoConfig.for_model(kind, **COMMON, **settings, attn_implementation="eager")
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    g = generator(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.1 * noise if "norm" in key else 0.2 * noise)
    return model.eval()


def tokens(seed: int = 2, shape: tuple[int, int] = (3, 24)) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=generator(seed))


def run_chunks(chunks: list[nn.Module], mesh: Mesh, ids: Tensor) -> Tensor | None:
    """The output of the last chunk on the last stage (None elsewhere), stage by stage with plain
    send and recv."""
    shards = mesh.tensor_size if mesh.parallel.sequence else 1
    ring = dist.get_process_group_ranks(mesh.pipeline_group)
    config = chunks[0].config
    out = None
    for number, chunk in enumerate(chunks):
        if not (mesh.is_first_stage and number == 0):
            hidden = torch.empty(
                ids.shape[1] // shards, ids.shape[0], config.hidden_size, dtype=config.params_dtype
            )
            dist.recv(hidden, src=ring[mesh.pipeline_rank - 1], group=mesh.pipeline_group)
            chunk.set_input_tensor(hidden)
        out = chunk(ids, None, None)
        if not (mesh.is_last_stage and number == len(chunks) - 1):
            dist.send(
                out.detach().contiguous(),
                dst=ring[(mesh.pipeline_rank + 1) % len(ring)],
                group=mesh.pipeline_group,
            )
    return out if mesh.is_last_stage else None


def whole_logits(part: Tensor, mesh: Mesh) -> Tensor:
    """All ranks' vocabulary shares together, padding dropped."""
    parts = [torch.empty_like(part) for _ in range(mesh.tensor_size)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tensor_group)
    return torch.cat(parts, -1)[..., :VOCAB]


def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """One hash of names and bytes."""
    h = hashlib.sha256()
    for name, tensor in weights:
        h.update(name.encode())
        h.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
