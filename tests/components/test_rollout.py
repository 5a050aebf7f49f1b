"""The sampler hands the recipe's settings to the actor, and nothing else."""

from __future__ import annotations

from typing import Any

from gipo_megatron.components.rollout import SamplingRollout
from gipo_megatron.specs import Sampling


class Recorder:
    def generate(self, prompts: Any, sampling: Sampling) -> Any:
        return prompts, sampling


def test_settings_reach_the_actor() -> None:
    sampler = SamplingRollout(temperature=0.7, top_k=5, top_p=0.9, data_max_response=64, seed=11)
    assert sampler.sample(Recorder(), "prompts", step=3) == (
        "prompts",
        Sampling(64, 0.7, 5, 0.9, 1.0, 11, 3),
    )  # type: ignore[arg-type]
    shorter = SamplingRollout(max_response=8, data_max_response=64, seed=0)
    assert shorter.sample(Recorder(), "prompts", step=0)[1].max_response == 8  # type: ignore[arg-type, index]
