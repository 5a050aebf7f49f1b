from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.fixtures import SHARED
from tests.runs import chain


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASE/sft, rm, ppo_kl, gipo (3 steps), gipo_long (5 steps, a checkpoint each), dpo…
    (test_dpo.py) and lora_… (test_adapters.py): one process, one start.

    sft, rm and gipo leave hf/; gipo_from_hf is gipo with its weights from sft/hf and rm/hf.
    """
    folder = tmp_path_factory.mktemp("runs")
    cases = [
        chain.sft(folder / "sft", "run.export_hf=true"),
        chain.reward_model(folder / "rm", folder / "sft", "run.export_hf=true"),
        chain.ppo("ppo_kl", folder / "ppo_kl", folder),
        chain.ppo("gipo", folder / "gipo", folder, "run.export_hf=true", "+report"),
        chain.ppo(
            "gipo",
            folder / "gipo_from_hf",
            folder,
            f"models.actor.load={folder}/sft/hf",
            f"models.reward.load={folder}/rm/hf",
        ),
        chain.long_gipo(folder / "gipo_long", folder),
        chain.dpo(folder / "dpo", folder, "run.save_every=1", "run.keep=9"),
        chain.dpo(folder / "dpo_live", folder, "algorithm.precompute=false"),
        chain.dpo(
            folder / "dpo_swapped",
            folder,
            "algorithm.precompute=false",
            "models.reference.offload=cpu",
        ),
        chain.dpo(folder / "dpo_resumed", folder, f"run.resume={folder}/dpo/checkpoints/step_2"),
        chain.dpo(folder / "dpo_longer", folder, "run.steps=2"),
        chain.dpo(folder / "dpo_longer", folder, "run.steps=4"),
        *chain.adapted(folder),
    ]
    chain.run_cases(cases, folder, processes=1)
    return folder


@pytest.fixture(scope="session")
def two(base: Path) -> Path:
    """The same GIPO run on two processes: each layout three steps, and resumes at another
    layout."""
    layouts = {
        "dp2": [],
        "tp2": ["parallel.tensor=2"],
        "tp2_sp": ["parallel.tensor=2", "parallel.sequence=true"],
        "pp2": ["parallel.pipeline=2"],
        "pp2_vpp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        "tp2_mb2_offload": [
            "parallel.tensor=2",
            "batch.micro_batch=2",
            "models.reference.offload=cpu",
            "models.critic.offload=cpu",
        ],
    }
    cases = [
        chain.ppo("gipo", base / name, base, "run.export_hf=true", *more)
        for name, more in layouts.items()
    ]
    cases += [
        chain.ppo("gipo", base / "dp2_then_tp2", base, "run.steps=2"),
        chain.ppo("gipo", base / "dp2_then_tp2", base, "run.steps=3", "parallel.tensor=2"),
        chain.ppo("gipo", base / "tp2_then_pp2", base, "run.steps=2", "parallel.tensor=2"),
        chain.ppo("gipo", base / "tp2_then_pp2", base, "run.steps=3", "parallel.pipeline=2"),
        chain.ppo("ppo_kl", base / "ppo_kl_dp2", base),
        chain.adapted_gipo(base / "lora_pp2_vpp2", base, *layouts["pp2_vpp2"]),
        chain.adapted_gipo(base / "lora_dp2_then_tp2_sp", base, "run.steps=2"),
        chain.adapted_gipo(base / "lora_dp2_then_tp2_sp", base, *layouts["tp2_sp"]),
        chain.dpo(base / "dpo_dp2", base),
        chain.dpo(base / "dpo_tp2", base, "parallel.tensor=2", "parallel.sequence=true"),
        chain.dpo(
            base / "dpo_pp2",
            base,
            "parallel.pipeline=2",
            f"run.resume={base}/dpo/checkpoints/step_2",
        ),
    ]
    if SHARED.is_dir():
        cases.append(
            chain.dpo(base / "dpo_hh", base, "run.steps=2", data=f"data.path={SHARED}/hh-rlhf")
        )
    chain.run_cases(cases, base, processes=2)
    return base
