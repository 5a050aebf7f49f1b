"""The plans of these tests, made by one process."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gipo_megatron.evaluation.recipe import is_evaluation
from gipo_megatron.recipe.files import recipe_names
from gipo_megatron.specs import Architecture, Parallel
from gipo_megatron.weights.hf_config import architecture_from_config
from tests import forked
from tests.parity.matrix import LAYOUTS
from tests.parity.planning_cases import FORMATS, tiny_architecture
from tests.smollm import CONFIG

ROOT = Path(__file__).resolve().parents[2]
TIED = Architecture(
    num_layers=8,
    hidden_size=128,
    ffn_hidden_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=1001,
    max_positions=256,
    tied_embeddings=True,
    qk_norm=True,
)
TIED_LAYOUT = Parallel(tensor=2, pipeline=4)
PLUGIN = "plugins=[tests.planning.pages]"
SERVE = "algorithm.rollout.serve"
TIGHT = ["recipe=hh_gipo", "hardware.gpu_memory_gib=40"]
PLANS = {
    "hh_sft": ["recipe=hh_sft"],
    "hh_gipo": ["recipe=hh_gipo"],
    "hh_gipo_offload": [
        "recipe=hh_gipo",
        *(f"models.{role}.offload=cpu" for role in ("actor", "critic", "reward", "reference")),
    ],
    "hh_rm": ["recipe=hh_rm"],
    "hh_dpo": ["recipe=hh_dpo"],
    "hh_dpo_live": ["recipe=hh_dpo", "algorithm.precompute=false"],
    "qwen": ["recipe=hh_gipo", "with=model/qwen2_5_7b"],
    "70b": ["recipe=hh_gipo_70b", "world=512"],
    "70b_small": ["recipe=hh_gipo_70b", "world=512", "hardware.gpu_memory_gib=26"],
    "tight": TIGHT,
    "hopeless": ["recipe=hh_gipo_70b", "hardware.gpu_memory_gib=5"],
    "spanning": ["recipe=hh_gipo", "world=16", "parallel.tensor=16"],
    "tiny": ["recipe=tiny/gipo"],
    "twice": ["recipe=hh_sft", PLUGIN, "algorithm={name: test_twice}"],
    "in_turn": [
        "recipe=hh_ppo_kl",
        PLUGIN,
        "algorithm={name: test_in_turn}",
        "models.reward.lr=1e-6",
        *(f"models.{role}.offload=cpu" for role in ("actor", "reward")),
    ],
    "needless": ["recipe=hh_gipo", "memory.recompute=full"],
    "server": ["recipe=hh_gipo_vllm"],
    "server_narrow": ["recipe=hh_gipo_vllm", f"{SERVE}.tensor_parallel=4"],
    "server_wide": ["recipe=hh_gipo_vllm", f"{SERVE}.gpu_memory=0.6"],
    "server_small": ["recipe=hh_gipo_vllm", f"{SERVE}.gpu_memory=0.04"],
    "server_in_stages": [
        "recipe=hh_gipo_vllm",
        "parallel.pipeline=2",
        f"{SERVE}.tensor_parallel=4",
    ],
    "server_apart": [
        "recipe=hh_gipo",
        "world=4",
        "hardware.gpus=4",
        "algorithm.rollout={name: vllm, serve: {devices: '4,5', tensor_parallel: 2}}",
    ],
    "server_elsewhere": ["recipe=hh_gipo", "algorithm.rollout={name: vllm, url: http://node7:80}"],
    "server_cpu": ["recipe=tiny/gipo", "algorithm.rollout.name=vllm"],
    "lora": ["recipe=lora/hh_gipo"],
    "needed": ["recipe=hh_sft", "memory.recompute=full", "hardware.gpu_memory_gib=31"],
}
DOCUMENTS = [ROOT / "docs" / name for name in ("scaling.md", "rollout.md", "lora.md")]


def shipped() -> list[str]:
    """The recipes for GPUs that train something."""
    return [
        name
        for name in recipe_names(ROOT / "recipes")
        if name.startswith(("hh_", "tldr_", "lora/"))
        and not is_evaluation([f"recipe={name}"], ROOT / "recipes")
    ]


def documented() -> dict[str, str]:
    """Arguments of `gipo plan` -> the part of its output in a document."""
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    return dict(re.findall(r"```\n\$ gipo plan ([^\n]+)\n(.*?)```", text, re.DOTALL))


def layout_cases() -> dict[str, dict[str, Any]]:
    """world/layout/format/rank of everything that tests/parity allocates."""
    architecture = dataclasses.asdict(tiny_architecture())
    return {
        f"{world}/{name}/{kind}/{rank}": {
            "architecture": architecture,
            "parallel": dataclasses.asdict(parallel),
            "world": world,
            "dtype": dtype,
            "rank": rank,
            "rank of adapters": adapters,
        }
        for world, layouts in LAYOUTS.items()
        for name, parallel in layouts.items()
        for kind, (dtype, adapters) in FORMATS.items()
        for rank in range(world)
    }


def evaluate(cases: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    done = forked.run(Path(__file__).parent / "evaluate.py", str(path), timeout=900)
    assert done.code == 0, done.stderr[-4000:]
    return json.loads(path.with_suffix(".out.json").read_text())


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """world/layout/format/rank -> role -> bytes. Apart from `plans`, because tests on another
    worker of pytest-xdist use them."""
    return evaluate(layout_cases(), tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tied = {
        "architecture": dataclasses.asdict(TIED),
        "parallel": dataclasses.asdict(TIED_LAYOUT),
        "world": 16,
        "dtype": "bf16",
    }
    smollm = {
        "architecture": dataclasses.asdict(architecture_from_config(CONFIG, "config.json")),
        "parallel": dataclasses.asdict(Parallel()),
        "world": 1,
        "dtype": "bf16",
        "rank": 0,
    }
    cases: dict[str, Any] = {
        **{f"tied/{stage}": {**tied, "rank": 4 * stage} for stage in range(4)},
        **{
            f"tied_lora/{stage}": {**tied, "rank": 4 * stage, "rank of adapters": 2}
            for stage in range(4)
        },
        **{f"smollm/{rank}": {**smollm, "rank of adapters": rank} for rank in (0, 16)},
        **{name: {"plan": argv} for name, argv in PLANS.items()},
        "shipped": {"verdicts": shipped()},
        **{f"document/{words}": {"plan": words.split()} for words in documented()},
    }
    return evaluate(cases, tmp_path_factory.mktemp("plans"))
