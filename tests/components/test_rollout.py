"""Samplers hand the recipe's settings to the actor or to a server, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from gipo_megatron import registry
from gipo_megatron.components.rollout import SamplingRollout, VLLMRollout
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.problems import Problem, RecipeErrors
from gipo_megatron.specs import Sampling, Serve
from tests.recipe.helpers import RECIPES, write


class Recorder:
    def generate(self, prompts: Any, sampling: Sampling) -> Any:
        return prompts, sampling


def test_settings_reach_the_actor() -> None:
    sampler = SamplingRollout(temperature=0.7, top_k=5, top_p=0.9, data_max_response=64, seed=11)
    expected = Sampling(64, 0.7, 5, 0.9, 1.0, 11, 3)
    assert sampler.sample(Recorder(), "prompts", step=3) == ("prompts", expected)  # type: ignore[arg-type]
    shorter = SamplingRollout(max_response=8, data_max_response=64, seed=0)
    assert shorter.sample(Recorder(), "prompts", step=0)[1].max_response == 8  # type: ignore[arg-type, index]
    greedy = Sampling(3, temperature=0.0)
    assert sampler.respond(Recorder(), "prompts", greedy) == ("prompts", greedy)  # type: ignore[arg-type]


def test_one_server_gets_the_actor_and_the_settings() -> None:
    """It is connected to when it is first used; held-out responses come from the same one."""
    made: list[VLLMRollout] = []

    class Server:
        def respond(self, *given: Any) -> Any:
            return given

    def connect(sampler: VLLMRollout) -> Server:
        made.append(sampler)
        return Server()

    sampler = VLLMRollout(url="http://a:1", data_max_response=9, seed=2, connect=connect)  # type: ignore[arg-type]
    assert made == []
    drawn = Sampling(9, seed=2, step=4)
    assert sampler.sample("actor", "prompts", step=4) == ("actor", "prompts", drawn)  # type: ignore[arg-type]
    cold = Sampling(5, temperature=0.0)
    assert sampler.respond("actor", "held out", cold) == ("actor", "held out", cold)  # type: ignore[arg-type]
    assert made == [sampler]


# -------------------------------------------------------------------------------------- recipe keys

SERVER = "algorithm.rollout={name: vllm, serve: {port: 8001, args: [--enforce-eager], python: ~/v}}"


def problems(*words: str) -> dict[str, Problem]:
    with pytest.raises(RecipeErrors) as caught:
        compose(["recipe=tiny/gipo", *words], RECIPES)
    return {problem.key: problem for problem in caught.value.problems}


def test_the_servers_block_is_typed_and_kept(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = compose(["recipe=tiny/gipo", SERVER], RECIPES)
    expected = Serve(python=f"{tmp_path}/v", port=8001, args=["--enforce-eager"])
    assert recipe.algorithm["rollout"]["serve"] == expected
    again = compose([f"recipe={write(tmp_path, again=recipe.to_yaml())}"], RECIPES)
    assert again.algorithm == recipe.algorithm
    runtime = {"max_response": 7, "seed": 0, "connect": None}
    built = registry.build("rollout", recipe.algorithm["rollout"], runtime)
    assert isinstance(built, VLLMRollout)
    assert (built.serve, built.data_max_response) == (expected, 7)
    assert registry.build("rollout", {"name": "vllm"}, runtime).serve == Serve()


def test_keys_of_a_server_that_are_wrong() -> None:
    found = problems(
        "algorithm.rollout={name: vllm, serve: {port: 70000, prot: 1, gpu_memory: 0, restarts: -1}}"
    )
    key = "algorithm.rollout.serve"
    assert found.keys() == {f"{key}.{name}" for name in ("port", "prot", "gpu_memory", "restarts")}
    assert "'port'" in found[f"{key}.prot"].fix
    for serve in ("{command: [sh], python: sh}", "{command: [sh], args: [x]}"):
        (problem,) = problems(f"algorithm.rollout={{name: vllm, serve: {serve}}}").values()
        assert problem.key == key and "command replaces them" in problem.what
    (problem,) = problems(
        "algorithm.rollout={name: vllm, url: 'http://a:1', serve: {port: 1}}"
    ).values()
    assert problem.key == key and "runs already" in problem.what
    assert problems("algorithm.rollout.url=http://a:1")["algorithm.rollout.url"].fix == (
        "read by: vllm"
    )


@pytest.mark.parametrize("name", ["sampling", "vllm"])
def test_a_cap_needs_a_correction(name: str) -> None:
    block = f"{{name: {name}, correction_cap: 3}}"
    (problem,) = problems(f"algorithm.rollout={block}").values()
    assert problem.key == "algorithm.rollout.correction_cap"
    assert problem.fix == "correction: truncated"
    words = [f"algorithm.rollout={block}", "algorithm.rollout.correction=truncated"]
    assert (
        compose(["recipe=tiny/gipo", *words], RECIPES).algorithm["rollout"]["correction_cap"] == 3
    )
