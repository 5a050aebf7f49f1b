"""config.json of the Hugging Face families Llama, Mistral, Qwen2 and Qwen3 to Architecture and
back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.files import read_object
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_checks import (
    KINDS,
    ROPE_KINDS,
    ROPE_TYPES,
    SIZES,
    rope_clashes,
    rope_type,
    uneven,
)
from gipo_megatron.weights.hf_values import FIX, TOKENS, check_ids, check_values

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
ONE_LABEL = {"num_labels": 1, "id2label": {"0": "SCORE"}, "label2id": {"SCORE": 0}}


def architecture_from_hf(folder: str | Path) -> Architecture:
    """Return the architecture of a folder's config.json (transformers 4 and 5). Raises UserError
    for what is not built, and for token ids in either configuration that are none."""
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    architecture = architecture_from_config(read_object(path, FIX), str(path))
    if generation.is_file():
        content = read_object(generation, FIX)
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
    if clashes := [*rope_clashes(config), *uneven(config)]:
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
    if scaling is not None and (kind := rope_type(scaling)) not in ROPE_TYPES:
        found["rope_type"] = kind
    return [f"{key}: {value}" for key, value in found.items() if value is not None]


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
    scaled = rope_type(block) != "default"
    return float(base), block if scaled else None, float(partial or 1.0)


def config_text(
    files: Mapping[str, str],
    architecture: Architecture,
    dtype: str,
    special_ids: Mapping[str, int],
    *,
    head: str | None = None,
    pad_token_id: int | None = None,
) -> str:
    """Return the config.json of written weights: the one that the model came with, where it came
    from Hugging Face (files: {name: text}), else one for its architecture.

    special_ids: bos_token_id, eos_token_id, pad_token_id. pad_token_id: of a model with a head.
    """
    if "config.json" in files:
        return config_like(files["config.json"], dtype, head=head, pad_token_id=pad_token_id)
    tokens: dict[str, int | None] = {**special_ids}
    if head is not None:
        tokens["pad_token_id"] = pad_token_id
    config = config_for(architecture, dtype, head=head, tokens=tokens)
    return json.dumps(config, indent=2) + "\n"


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
    class, one label and its padding, without the names of code; the same text where none of them
    differ. transformers 4 reads no `rope_parameters`, so its keys are written beside them.

    pad_token_id: the id that a classifier's texts may be padded with; None: no id is safe.
    """
    config: dict[str, Any] = json.loads(source)
    code = config.pop("auto_map", None)  # runs where a reader trusts the written folder
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
    return source if not changes and code is None else json.dumps(config | changes, indent=2) + "\n"


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Return whether config.json is that of an AutoModelForSequenceClassification."""
    return str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")


def num_labels(config: Mapping[str, Any]) -> int:
    """Return the number of labels as transformers counts them: the names in id2label, else 2."""
    return len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels") or 2)
