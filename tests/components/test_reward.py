"""Rewards: penalties, running moments against numpy over all history, clipping, ensembles,
functions."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gipo_megatron.components.reward import EnsembleReward, FunctionReward, ModelReward
from gipo_megatron.errors import UserError
from gipo_megatron.local.replicas import replica_rows, run_replicas
from gipo_megatron.roles import SingleReplica
from gipo_megatron.types import Rollout
from tests.small_ppo import rollout_of

DP = SingleReplica()


class Table:
    """A reward model that looks the score up by sample id."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = torch.tensor(scores)

    def score(self, batch: Rollout) -> Tensor:
        return self.scores[batch.sample_id]


def model(scores: list[float], dp: Any = DP, **settings: Any) -> ModelReward:
    return ModelReward(**settings, reward_models={"reward": Table(scores)}, dp=dp)


def batches(count: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(0)
    return [(k + 3 * torch.randn(6, generator=generator)).tolist() for k in range(count)]


def test_moments_are_numpys_over_all_history() -> None:
    history: list[float] = []
    reward = model([])
    for batch in batches(4):
        reward._reward_model = Table(batch)
        scores = reward.score(rollout_of(["a"] * 6))
        history += torch.tensor(batch).double().tolist()
        mean, std = np.mean(history), np.std(history)
        assert scores.std == pytest.approx(std, rel=1e-12)
        assert scores.shaped.numpy() == pytest.approx(
            np.clip((np.array(batch) - mean) / std, -0.8, 0.8), abs=1e-6
        )
        assert scores.standardised_scores.numpy() == pytest.approx(
            np.clip((np.array(batch) - np.mean(batch)) / std, -3, 3), abs=1e-6
        )
        resumed = model([])
        resumed.load_state_dict(reward.state_dict())
        reward = resumed
    assert len(history) == 24


def test_a_large_offset_keeps_its_variance() -> None:
    scores = model([1e6, 1e6 + 1, 1e6 + 2]).score(rollout_of(["a"] * 3))
    assert scores.std == pytest.approx((2 / 3) ** 0.5, rel=1e-9)


def test_outliers_are_clipped_in_both_forms() -> None:
    scores = model([0.0] * 99 + [100.0]).score(rollout_of(["a"] * 100))
    assert float(scores.shaped[-1]) == pytest.approx(0.8)
    assert float(scores.standardised_scores[-1]) == 3.0
    assert float(scores.raw[-1]) == 100.0


def test_equal_scores_have_no_return() -> None:
    scores = model([5.0] * 4).score(rollout_of(["a"] * 4))
    assert scores.standardised_scores.tolist() == [0.0] * 4
    assert scores.shaped.tolist() == [0.0] * 4


def test_scores_that_are_not_finite_count_nowhere() -> None:
    reward = model([1.0, float("nan"), 3.0, float("inf")])
    scores = reward.score(rollout_of(["a"] * 4))
    assert reward.state_dict() == {"count": 2.0, "mean": 2.0, "squares": 2.0}
    assert scores.standardised_scores[[0, 2]].tolist() == [-1.0, 1.0]
    assert scores.raw[1].isnan()


def test_without_normalisation_and_clip() -> None:
    scores = model([1.0, 5.0], normalise=False, clip=0.0).score(rollout_of(["a"] * 2))
    assert scores.shaped.tolist() == [1.0, 5.0]
    assert model([1.0, 5.0], normalise=False, clip=2.0).score(
        rollout_of(["a"] * 2)
    ).shaped.tolist() == [1.0, 2.0]


def test_penalties_are_part_of_raw() -> None:
    """Two response tokens each; the second response was cut."""
    rollout = replace(rollout_of(["a"] * 2), finished=torch.tensor([True, False]))
    reward = model([1.0, 1.0], missing_eos_penalty=0.5, length_penalty=0.1)
    raw, parts = reward.raw(rollout)
    assert raw.tolist() == pytest.approx([0.8, 0.3])
    assert parts["missing_eos"].tolist() == [0.0, -0.5]
    assert parts["length"].tolist() == pytest.approx([-0.2, -0.2])
    assert reward.state_dict()["count"] == 0  # looking is free
    assert reward.score(rollout).parts.keys() == {"missing_eos", "length"}


def test_every_replica_has_the_global_moments() -> None:
    whole = [float(x) for x in range(8)]
    rollout = rollout_of(["a"] * 8)

    def work(dp: Any) -> tuple[dict[str, Any], Tensor]:
        reward = model(whole, dp)
        scores = reward.score(replica_rows(rollout, dp))
        return reward.state_dict(), scores.standardised_scores

    state, returns = work(DP)
    for rank, (other, part) in enumerate(run_replicas(4, work)):
        assert other == pytest.approx(state)
        torch.testing.assert_close(part, returns[rank::4])


def ensemble(combine: str, **settings: Any) -> EnsembleReward:
    models = {
        "reward_a": Table([1.0, 4.0]),
        "reward_b": Table([3.0, 0.0]),
        "reward": Table([9.0, 9.0]),
    }
    return EnsembleReward(
        members=["reward_a", "reward_b"], combine=combine, **settings, reward_models=models, dp=DP
    )


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("mean", [2.0, 2.0]), ("min", [1.0, 0.0]), ("mean_minus_std", [1.5, 1.0])],
)
def test_ensembles_by_hand(combine: str, expected: list[float]) -> None:
    """Standard deviations over the two members: 1 and 2; k = 0.5."""
    raw, parts = ensemble(combine, k=0.5).raw(rollout_of(["a"] * 2))
    assert raw.tolist() == expected
    assert parts["disagreement"].tolist() == [1.0, 2.0]
    assert parts["reward_b"].tolist() == [3.0, 0.0]


def test_a_function_sees_prompt_response_and_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_rewards")
    seen = []

    def length(prompt: str, response: str, extras: dict[str, Any]) -> float:
        seen.append((prompt, response, extras["gold"]))
        return float(len(seen))

    module.length = length  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    rollout = replace(
        rollout_of(["a"] * 2), extras=({"prompt": "p", "gold": 1}, {"prompt": "q", "gold": 2})
    )
    raw, _ = FunctionReward(function="my_rewards:length", dp=DP).raw(rollout)
    assert raw.tolist() == [1.0, 2.0]
    assert seen == [("p", "response 0", 1), ("q", "response 1", 2)]


@pytest.mark.parametrize(
    "path", ["", "no_colon", "json:no_such_function", "no_such_module_at_all:f", "json:__name__"]
)
def test_a_function_that_is_not_there(path: str) -> None:
    with pytest.raises(UserError) as error:
        FunctionReward(function=path, dp=DP)
    assert error.value.where == "reward.function"


def test_missing_reward_models_are_named() -> None:
    with pytest.raises(UserError, match="'reward'; there is reward_a"):
        ModelReward(reward_models={"reward_a": Table([])}, dp=DP)  # type: ignore[dict-item]
    with pytest.raises(UserError, match="'reward_c'"):
        EnsembleReward(
            members=["reward_a", "reward_c"], reward_models={"reward_a": Table([])}, dp=DP
        )  # type: ignore[dict-item]
    single = EnsembleReward(members=["reward_a"], reward_models={"reward_a": Table([])}, dp=DP)  # type: ignore[dict-item]
    assert ["an ensemble of reward_a" in error.what for error in single.problems()] == [True]
