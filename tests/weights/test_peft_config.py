"""adapter_config.json: what is read of it, what is refused, and a round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.specs import AdapterSpec
from gipo_megatron.weights.peft_config import config_for, spec_of

# as PEFT 0.17 wrote it, in its order
WRITTEN: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}


def read(folder: Path, **changes: Any) -> AdapterSpec:
    (folder / "adapter_config.json").write_text(json.dumps(WRITTEN | changes))
    return spec_of(folder)


def test_what_peft_writes(tmp_path: Path) -> None:
    assert read(tmp_path) == AdapterSpec(8, 16.0, ("q_proj", "v_proj"))
    assert read(tmp_path, use_rslora=True).scaling == "rslora"
    assert read(tmp_path, modules_to_save=["score"], task_type="SEQ_CLS").rank == 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target lm_head"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"target_modules": []}, "target_modules"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"a_new_method": {"on": 1}}, "a_new_method"),
    ],
)
def test_other_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes", [{"r": 0}, {"r": "8"}, {"lora_alpha": -1}, {"target_modules": "q"}]
)
def test_wrong_values_are_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        read(tmp_path, **changes)


@pytest.mark.parametrize("spec", [AdapterSpec(4), AdapterSpec(2, 2.5, ("o_proj",), "rslora")])
def test_round_trip(tmp_path: Path, spec: AdapterSpec) -> None:
    (tmp_path / "adapter_config.json").write_text(config_for(spec, "org/base", "score"))
    assert spec_of(tmp_path) == spec


def test_the_order_of_targets_makes_no_other_adapters(tmp_path: Path) -> None:
    assert read(tmp_path) == AdapterSpec(8, 16.0, ("v_proj", "q_proj"))
