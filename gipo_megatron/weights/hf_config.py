"""config.json of the Hugging Face families Llama, Mistral, Qwen2 and Qwen3 to Architecture and
back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
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
    check_ids,
    check_values,
    read_object,
)

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# families that are often tried, and what Megatron-Core 0.16 or this project lacks for them
WHY_NOT = {
    "gemma2": "it soft-caps attention logits, which Megatron-Core's attention does not compute",
    "gemma3_text": "its layers alternate two rotary bases and sliding windows",
    "mixtral": "mixtures of experts are not built",
    "qwen2_moe": "mixtures of experts are not built",
    "qwen3_moe": "mixtures of experts are not built",
    "phi3": "its fused projections have no table yet",
}
# keys that may only have this value, which is also that of a config without them
ONLY: dict[str, dict[str, bool]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
}
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
ONE_LABEL = {"num_labels": 1, "id2label": {"0": "SCORE"}, "label2id": {"SCORE": 0}}


def architecture_from_hf(folder: str | Path) -> Architecture:
    """Return the architecture of a folder's config.json (transformers 4 and 5). Raises UserError
    for what is not built, and for token ids in either configuration that are none."""
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    architecture = architecture_from_config(read_object(path), str(path))
    if generation.is_file():
        content = read_object(generation)
        check_values(content, TOKENS, str(generation))
        check_ids(content, architecture.vocab_size, str(generation))
    return architecture


def architecture_from_config(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture of a parsed config.json.

    Raises UserError naming every key that is missing, has a value of another type, contradicts
    another key, or needs a part that is not built.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        reason = f": {WHY_NOT[family]}" if isinstance(family, str) and family in WHY_NOT else ""
        raise UserError(
            f"model_type {family!r} is not built{reason}",
            where=where,
            fix=f"one of {', '.join(FAMILIES)}",
        )
    if missing := [key for key in (*SIZES, "rms_norm_eps") if key not in config]:
        raise UserError(f"config.json lacks {', '.join(missing)}", where=where, fix=FIX)
    check_values(config, KINDS, where)
    for key in ("rope_parameters", "rope_scaling"):
        check_values(config.get(key) or {}, ROPE_KINDS, where, block=f"{key}.")
    check_ids(config, config["vocab_size"], where)
    if unbuilt := _unbuilt(config):
        raise UserError(
            f"not built: {', '.join(unbuilt)}", where=where, fix="use a model without these"
        )
    if clashes := [*_rope_clashes(config), *_uneven(config)]:
        raise UserError("; ".join(clashes), where=where, fix=FIX)
    base, scaling, _ = _rope(config)
    heads = config["num_attention_heads"]
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_positions=_max_positions(config),
        rope_base=base,
        rope_scaling=scaling,
        norm_eps=float(config["rms_norm_eps"]),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=bool(config.get("tie_word_embeddings")),
    )


def _unbuilt(config: Mapping[str, Any]) -> list[str]:
    """Return `key: value` of every setting that has no implementation here."""
    allowed: dict[str, Any] = {"hidden_act": "silu", **ONLY[config["model_type"]]}
    found = {key: config[key] for key, value in allowed.items() if config.get(key, value) != value}
    _, scaling, partial = _rope(config)
    if quantised := config.get("quantization_config"):
        found["quantization_config"] = quantised.get("quant_method", "yes")
    if partial != 1.0:
        found["partial_rotary_factor"] = partial
    if scaling is not None and (kind := _rope_type(scaling)) not in ROPE_TYPES:
        found["rope_type"] = kind
    return [f"{key}: {value}" for key, value in found.items() if value is not None]


def _uneven(config: Mapping[str, Any]) -> list[str]:
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


def _rope_clashes(config: Mapping[str, Any]) -> list[str]:
    """Return what a rotary block lacks, and keys of transformers 4 and 5 that contradict each
    other: each version reads its own."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    found = []
    for name, block in (("rope_scaling", old), ("rope_parameters", new)):
        scaled = block.keys() & set(ROPE_TYPES["llama3"])
        if scaled and not block.keys() & {"rope_type", "type"}:
            found.append(f"{name} lacks rope_type")
        elif lost := [key for key in ROPE_TYPES.get(_rope_type(block), ()) if key not in block]:
            found.append(f"{name} ({_rope_type(block)}) lacks {', '.join(lost)}")
        elif block.get("low_freq_factor", 0) >= block.get("high_freq_factor", math.inf):
            found.append(f"{name}: low_freq_factor is not below high_freq_factor")
    base = new.get("rope_theta", old.get("rope_theta", config.get("rope_theta")))
    pairs = [("rope_theta", base, config.get("rope_theta", base))]
    if old and new:
        pairs.append(("rope_type", _rope_type(new), _rope_type(old)))
        pairs += [(key, new.get(key), old.get(key)) for key in ROPE_TYPES["llama3"]]
    for key, mine, theirs in pairs:
        if mine != theirs:
            found.append(f"two values of {key}: {mine} in rope_parameters, {theirs} beside it")
    return found


def _max_positions(config: Mapping[str, Any]) -> int:
    """Return how many positions have full attention: Mistral's has it within its sliding
    window."""
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    return min(config["max_position_embeddings"], window or config["max_position_embeddings"])


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None, float]:
    """Return (base, scaling block or None, rotated share of a head). transformers 5 writes
    `rope_parameters`, 4 wrote `rope_scaling` and `rope_theta`."""
    block = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = block.pop("rope_theta", config.get("rope_theta", 10000.0))
    partial = block.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    scaled = _rope_type(block) != "default"
    return float(base), block if scaled else None, float(partial or 1.0)


def _rope_type(block: Mapping[str, Any]) -> str:
    return str(block.get("rope_type", block.get("type", "default")))


def config_for(
    a: Architecture, dtype: str, *, head: str | None = None, tokens: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return config.json for an architecture: of Qwen2 with QKV bias, of Qwen3 with QK-norm, else
    of Llama (Mistral's mathematics is the same).

    tokens: bos_token_id, eos_token_id, pad_token_id. Raises UserError for QKV bias with QK-norm,
    which no family has.
    """
    if a.qkv_bias and a.qk_norm:
        raise UserError(
            "no Hugging Face family has both QKV bias and QK-norm",
            where="architecture",
            fix="set one of them to false",
        )
    family = "qwen2" if a.qkv_bias else "qwen3" if a.qk_norm else "llama"
    scaling = a.rope_scaling or {"rope_type": "default"}
    config: dict[str, Any] = {
        "architectures": [class_name(family, head)],
        "model_type": family,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_base,
        "rope_scaling": a.rope_scaling,
        "rope_parameters": {"rope_theta": a.rope_base, **scaling},
        "tie_word_embeddings": a.tied_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
        **(tokens or {}),
    }
    if family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    return config if head is None else config | ONE_LABEL


def class_name(family: str, head: str | None) -> str:
    """Return transformers' class: LlamaForCausalLM, Qwen3ForSequenceClassification, …"""
    return FAMILIES[family] + ("ForCausalLM" if head is None else "ForSequenceClassification")


def config_like(
    source: str, dtype: str, *, head: str | None = None, pad_token_id: int | None = None
) -> str:
    """Return `source`, the config.json that a model came with, with the written model's dtype,
    class, one label and its padding; the same text where none of them differ. transformers 4 reads
    no `rope_parameters`, so its keys are written beside them.

    pad_token_id: the id that a classifier's texts may be padded with; None: no id is safe.
    """
    config: dict[str, Any] = json.loads(source)
    changes: dict[str, Any] = {
        key: dtype for key in ("dtype", "torch_dtype") if config.get(key, dtype) != dtype
    }
    base, scaling, _ = _rope(config)
    if "rope_theta" not in config:
        changes["rope_theta"] = base
    if scaling is not None and not config.get("rope_scaling"):
        changes["rope_scaling"] = scaling
    name = class_name(config["model_type"], head)
    if config.get("architectures") != [name]:
        changes["architectures"] = [name]
    if head is not None and not (is_classifier(config) and num_labels(config) == 1):
        changes |= ONE_LABEL
    if head is not None and config.get("pad_token_id") != pad_token_id:
        changes["pad_token_id"] = pad_token_id
    return source if not changes else json.dumps(config | changes, indent=2) + "\n"


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Return whether config.json is that of an AutoModelForSequenceClassification."""
    return str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")


def num_labels(config: Mapping[str, Any]) -> int:
    """Return the number of labels as transformers counts them: the names in id2label, else 2."""
    return len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels") or 2)


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
