"""Checks of config.json: the type of each value, keys against each other, keys against the
tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_values import (
    BLOCK,
    FIX,
    FLAG,
    NAMES,
    NUMBER,
    SIZE,
    TEXT,
    TOKENS,
    Kind,
)

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
ROPE_TYPES = {  # rope_type -> the numbers that it needs
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
KINDS: dict[str, Kind] = {  # the value of every key that is read
    "model_type": TEXT,
    **dict.fromkeys(SIZES, SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), SIZE.or_null()),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), NUMBER),
    "partial_rotary_factor": NUMBER.or_null(),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), FLAG.or_null()
    ),
    **dict.fromkeys(("hidden_act", "dtype", "torch_dtype"), TEXT.or_null()),
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters", "quantization_config", "id2label"), BLOCK.or_null()
    ),
    "architectures": NAMES.or_null(),
    "num_labels": SIZE.or_null(),
    **TOKENS,
}
ROPE_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    **dict.fromkeys(("rope_theta", *ROPE_TYPES["llama3"]), NUMBER),
    "partial_rotary_factor": NUMBER.or_null(),
}


def uneven(config: Mapping[str, Any]) -> list[str]:
    """Return the sizes of attention that do not divide."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    width = config.get("head_dim")
    found = []
    if heads % groups:
        found.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    if width is None and hidden % heads:
        found.append(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    if (width or hidden // heads) % 2:
        found.append(f"head_dim {width or hidden // heads} is odd")
    return found


def rope_clashes(config: Mapping[str, Any]) -> list[str]:
    """Return what a rotary block lacks, and keys of transformers 4 and 5 that contradict each
    other: each version reads its own."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    found = []
    for name, block in (("rope_scaling", old), ("rope_parameters", new)):
        scaled = block.keys() & set(ROPE_TYPES["llama3"])
        if scaled and not block.keys() & {"rope_type", "type"}:
            found.append(f"{name} lacks rope_type")
        elif lost := [key for key in ROPE_TYPES.get(rope_type(block), ()) if key not in block]:
            found.append(f"{name} ({rope_type(block)}) lacks {', '.join(lost)}")
        elif block.get("low_freq_factor", 0) >= block.get("high_freq_factor", math.inf):
            found.append(f"{name}: low_freq_factor is not below high_freq_factor")
    base = new.get("rope_theta", old.get("rope_theta", config.get("rope_theta")))
    pairs = [("rope_theta", base, config.get("rope_theta", base))]
    if old and new:
        pairs.append(("rope_type", rope_type(new), rope_type(old)))
        pairs += [(key, new.get(key), old.get(key)) for key in ROPE_TYPES["llama3"]]
    for key, mine, theirs in pairs:
        if mine != theirs:
            found.append(f"two values of {key}: {mine} in rope_parameters, {theirs} beside it")
    return found


def rope_type(block: Mapping[str, Any]) -> str:
    """Return the kind of a block of rotary positions; older transformers wrote `type`."""
    return str(block.get("rope_type", block.get("type", "default")))


def check_shapes(a: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise UserError naming each key of config.json whose size is not that of the tensors."""
    embedding, layer = "model.embed_tokens.weight", "model.layers.0."
    q, k = (f"{layer}self_attn.{x}_proj.weight" for x in "qk")
    sizes = (
        ("vocab_size", a.vocab_size, embedding, 0),
        ("hidden_size", a.hidden_size, embedding, 1),
        ("intermediate_size", a.ffn_hidden_size, f"{layer}mlp.gate_proj.weight", 0),
        ("num_attention_heads × head_dim", a.num_heads * a.head_dim, q, 0),
        ("num_key_value_heads × head_dim", a.num_kv_heads * a.head_dim, k, 0),
    )
    found = [
        (key, size, shapes[name][axis])
        for key, size, name, axis in sizes
        if len(shapes.get(name, ())) == 2
    ]
    if layers := {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}:
        found.append(("num_hidden_layers", a.num_layers, len(layers)))
    wrong = [f"{key} {size}, by the tensors {real}" for key, size, real in found if size != real]
    if wrong:
        raise UserError(
            f"config.json is of another model: {'; '.join(wrong)}", where=where, fix=FIX
        )
