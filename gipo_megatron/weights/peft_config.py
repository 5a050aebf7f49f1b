"""PEFT's adapter_config.json: the adapters that it describes, and one for ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.files import read_object
from gipo_megatron.specs import LINEARS, AdapterSpec
from gipo_megatron.weights.hf_values import (
    FIX,
    FLAG,
    NAMES,
    NUMBER,
    SIZE,
    TEXT,
    Kind,
    check_values,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of a tensor's name, before the model's own
HEADS = {"score", "classifier"}  # PEFT lists both for a model with a head

# keys that change no output of a saved adapter, or whose values are read here
_READ = {
    "r": SIZE,
    "lora_alpha": NUMBER,
    "target_modules": NAMES,
    "use_rslora": FLAG,
    "base_model_name_or_path": TEXT.or_null(),
    "modules_to_save": NAMES.or_null(),
    "init_lora_weights": Kind("true, false or a text", lambda value: isinstance(value, bool | str)),
}
# first values of the adapters alone; the others change W, and PEFT changes it again at each load
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_NO_EFFECT = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "bias",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}


def spec_of(folder: Path) -> AdapterSpec:
    """Return the adapters of a PEFT folder. Their dropout is for training, and is not read.

    Raises UserError for a method that is not plain LoRA, and for layers that have no adapter here.
    """
    path, config = folder / CONFIG, _config(folder)
    if lost := [key for key in ("r", "lora_alpha", "target_modules") if key not in config]:
        raise UserError(f"lacks {', '.join(lost)}", where=str(path), fix="export it again")
    if others := _others(config):
        raise UserError(
            f"adapters that are not built here: {'; '.join(others)}",
            where=str(path),
            fix="merge them into their model with PEFT, and load that",
        )
    targets = tuple(name for name in LINEARS if name in config["target_modules"])
    scaling = "rslora" if config.get("use_rslora") else "standard"
    return AdapterSpec(config["r"], float(config["lora_alpha"]), targets, scaling)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = read_object(path, FIX)
    check_values(config, _READ, str(path))
    return config


def _others(config: dict[str, Any]) -> list[str]:
    """Return `key value` of all that makes other adapters than plain ones on our layers. A key that
    a later PEFT adds is off where it is null, false or empty."""
    found = [
        f"{key} {value!r}"
        for key, value in config.items()
        if value and key not in _READ and key not in _NO_EFFECT
    ]
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']!r}")
    if config.get("init_lora_weights", True) not in _STARTS:
        found.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if not config["target_modules"]:
        found.append("target_modules []")
    if others := sorted(set(config.get("modules_to_save") or ()) - HEADS):
        found.append(f"modules_to_save {others!r}")
    layers = sorted(set(config["target_modules"]) - set(LINEARS))
    return found + [f"target {name}" for name in layers]


def base_name(folder: Path) -> str:
    """Return the folder or hub name of the model that a PEFT folder's adapters belong to."""
    key = "base_model_name_or_path"
    name = _config(folder).get(key) or ""
    if not name or (Path(name) / CONFIG).is_file():
        raise UserError(
            f"{key}: {name or 'no'} model that adapters could be added to",
            where=str(folder / CONFIG),
            fix=f"write the Hugging Face folder or the hub name of their model at {key}",
        )
    return name


def config_for(spec: AdapterSpec, base: str, head: str | None) -> str:
    """Return the text of adapter_config.json. base: the folder or hub name of the frozen model."""
    whole = spec.alpha == int(spec.alpha)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if whole else spec.alpha,
        "lora_dropout": 0.0,
        "use_rslora": spec.scaling == "rslora",
        "target_modules": list(spec.targets),
        "modules_to_save": None if head is None else ["score"],
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return json.dumps(config, indent=2) + "\n"
