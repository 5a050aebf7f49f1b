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
from gipo_megatron.types import Rollout, Sequences
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
            np.clip((np.array(batch) - mean) / std, -5, 5), abs=1e-6
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
    assert float(scores.shaped[-1]) == pytest.approx(5.0)
    assert float(scores.standardised_scores[-1]) == 3.0
    assert float(scores.raw[-1]) == 100.0


def test_equal_scores_have_no_return() -> None:
    scores = model([5.0] * 4).score(rollout_of(["a"] * 4))
    assert scores.standardised_scores.tolist() == [0.0] * 4
    assert scores.shaped.tolist() == [0.0] * 4


def test_scores_that_are_not_finite_count_nowhere() -> None:
    reward = model([1.0, float("nan"), 3.0, float("inf")])
    scores = reward.score(rollout_of(["a"] * 4))
    assert reward.state_dict() == {
        "moments": {"count": 2.0, "mean": 2.0, "squares": 2.0},
        "anchors": {},
    }
    assert scores.standardised_scores[[0, 2]].tolist() == [-1.0, 1.0]
    assert scores.raw[1].isnan()


def test_without_normalisation_and_clip() -> None:
    scores = model([1.0, 5.0], normalise=False, clip=0.0).score(rollout_of(["a"] * 2))
    assert scores.shaped.tolist() == [1.0, 5.0]
    assert model([1.0, 5.0], normalise=False, clip=2.0).score(
        rollout_of(["a"] * 2)
    ).shaped.tolist() == [1.0, 2.0]


def test_the_length_penalty_is_part_of_raw() -> None:
    """Two response tokens each."""
    reward = model([1.0, 2.0], length_penalty=0.1)
    raw, parts = reward.raw(rollout_of(["a"] * 2))
    assert raw.tolist() == pytest.approx([0.8, 1.8])
    assert parts["length"].tolist() == pytest.approx([-0.2, -0.2])
    assert reward.state_dict()["moments"]["count"] == 0  # looking is free


@pytest.mark.parametrize("normalise", [True, False])
def test_a_cut_response_costs_standard_deviations_and_is_no_group(normalise: bool) -> None:
    """Scores 1, 3, 1, 3 have std 1, the same two times ten std 10; the third and fourth response
    were cut. G and the std are those of the scores alone."""
    cut = torch.tensor([True, True, False, False])
    rollout = replace(rollout_of(["a"] * 4), finished=cut)
    for scale in (1.0, 10.0):
        table = [1.0 * scale, 3.0 * scale] * 2
        scores = model(table, missing_eos_penalty=0.5, normalise=normalise, clip=0.0).score(rollout)
        plain = [-1.0, 1.0, -1.0, 1.0] if normalise else table
        unit = 1.0 if normalise else scale
        expected = [x - 0.5 * unit * y for x, y in zip(plain, (0, 0, 1, 1), strict=True)]
        assert scores.shaped.tolist() == pytest.approx(expected)
        assert scores.standardised_scores.tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0])
        assert scores.std == pytest.approx(scale)
        assert scores.parts["missing_eos"].tolist() == [0.0, 0.0, -0.5, -0.5]
        assert scores.raw.tolist() == table


# -------------------------------------------------------------------------------------- anchors


class PerPrompt:
    """A Bradley-Terry model: a score that matters, plus any f(x); chosen responses score 2."""

    def __init__(self, offsets: list[float]) -> None:
        self.offsets, self.passes = torch.tensor(offsets), 0

    def score(self, batch: Rollout | Sequences) -> Tensor:
        self.passes += 1
        if isinstance(batch, Sequences):
            return 2.0 + self.offsets[batch.ids]
        return batch.sample_id.float() + self.offsets[batch.prompt_id]


def chosen_of(ids: Tensor) -> Sequences:
    rows = rollout_of(["a"] * len(ids), ids.tolist()).sequences
    return replace(rows, ids=ids)


def anchored(offsets: list[float], dp: Any = DP) -> ModelReward:
    models = {"reward": PerPrompt(offsets)}
    return ModelReward(anchor="chosen", chosen=chosen_of, reward_models=models, dp=dp)


def test_an_anchor_cancels_any_offset_of_a_prompt() -> None:
    """Offsets are binary fractions, so that float32 is exact."""
    rollout = rollout_of(["a"] * 6, [0, 0, 1, 1, 2, 2])
    with_offsets = anchored([512.5, -64.25, 8.0]).score(rollout)
    without = anchored([0.0, 0.0, 0.0]).score(rollout)
    assert with_offsets.raw.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    for name in ("raw", "shaped", "standardised_scores"):
        assert torch.equal(getattr(with_offsets, name), getattr(without, name)), name
    assert with_offsets.parts["anchor"].tolist() == [514.5, 514.5, -62.25, -62.25, 10.0, 10.0]
    # evaluation reads the model's own score
    assert anchored([512.5, 0.0, 0.0]).raw(rollout)[0][0] == 512.5


def test_an_anchor_is_scored_once_and_kept_in_checkpoints() -> None:
    reward, rollout = anchored([1.0, 2.0, 3.0]), rollout_of(["a"] * 4, [0, 0, 2, 2])
    first = reward.score(rollout)
    assert reward._reward_model.passes == 2  # type: ignore[attr-defined]
    resumed = anchored([1.0, 2.0, 3.0])
    resumed.load_state_dict(reward.state_dict())
    again = resumed.score(rollout)
    assert resumed._reward_model.passes == 1  # type: ignore[attr-defined]
    assert torch.equal(first.raw, again.raw)
    resumed.score(rollout_of(["a"] * 2, [0, 1]))
    assert resumed._reward_model.passes == 3  # type: ignore[attr-defined]


def test_replicas_share_their_anchors() -> None:
    rollout = rollout_of(["a"] * 4, [0, 0, 1, 2])

    def work(dp: Any) -> tuple[list[float], dict[int, float]]:
        reward = anchored([1.0, 2.0, 3.0], dp)
        raw = reward.score(replica_rows(rollout, dp)).raw.tolist()
        return raw, reward.state_dict()["anchors"]

    everyone = {0: 3.0, 1: 4.0, 2: 5.0}
    assert work(DP) == ([-2.0, -1.0, 0.0, 1.0], everyone)
    assert run_replicas(2, work) == [([-2.0, 0.0], everyone), ([-1.0, 1.0], everyone)]


def test_an_anchor_that_is_no_number_is_not_kept() -> None:
    reward = anchored([float("nan"), 1.0])
    assert reward.score(rollout_of(["a"] * 2, [0, 1])).raw.isnan().tolist() == [True, False]
    assert reward.state_dict()["anchors"] == {1: 3.0}


def test_data_without_chosen_responses_have_no_anchor() -> None:
    with pytest.raises(UserError) as error:
        ModelReward(anchor="chosen", reward_models={"reward": Table([])}, dp=DP)  # type: ignore[dict-item]
    assert error.value.where == "reward.anchor"


def test_every_replica_has_the_global_moments() -> None:
    whole = [float(x) for x in range(8)]
    rollout = rollout_of(["a"] * 8)

    def work(dp: Any) -> tuple[dict[str, Any], Tensor]:
        reward = model(whole, dp)
        scores = reward.score(replica_rows(rollout, dp))
        return reward.state_dict()["moments"], scores.standardised_scores

    state, returns = work(DP)
    for rank, (other, part) in enumerate(run_replicas(4, work)):
        assert other == pytest.approx(state)
        torch.testing.assert_close(part, returns[rank::4])


def ensemble(combine: str, tables: list[list[float]], **settings: Any) -> EnsembleReward:
    models = {f"reward_{i}": Table(table) for i, table in enumerate(tables)}
    return EnsembleReward(
        members=[*models], combine=combine, **settings, reward_models=models, dp=DP
    )


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("mean", [0.0, 0.0]), ("min", [-1.0, -1.0]), ("mean_minus_std", [-0.5, -0.5])],
)
def test_ensembles_by_hand(combine: str, expected: list[float]) -> None:
    """Standardised, the members are -1, 1 and 1, -1; their std is 1 for both rows; k = 0.5."""
    raw, parts = ensemble(combine, [[1.0, 5.0], [3.0, 1.0]], k=0.5).raw(rollout_of(["a"] * 2))
    assert raw.tolist() == expected
    assert parts["disagreement"].tolist() == [1.0, 1.0]
    assert parts["reward_1"].tolist() == [3.0, 1.0]


def test_an_ensemble_is_not_its_member_of_the_lowest_level() -> None:
    """Offsets and scales of a Bradley-Terry model are arbitrary: 0 … 5 falling, 105 … 100 rising.
    The minimum takes each member where it is the lower one."""
    falling, rising = [float(x) for x in range(6)], [105.0 - 10 * x for x in range(6)]
    rollout = rollout_of(["a"] * 6)
    raw = ensemble("min", [falling, rising]).raw(rollout)[0]
    z = (np.arange(6) - 2.5) / np.std(np.arange(6))
    assert raw.numpy() == pytest.approx(np.minimum(z, -z), abs=1e-6)


def test_an_ensembles_score_stays_one_function() -> None:
    """Later batches do not move the scales, so that evaluations of one run can be compared."""
    reward = ensemble("mean", [[0.0, 2.0, 50.0], [1.0, 3.0, 90.0]])
    early = rollout_of(["a"] * 2)
    before = reward.raw(early)[0]
    reward.score(replace(early, sample_id=torch.tensor([2, 2])))
    assert torch.equal(reward.raw(early)[0], before)
    resumed = ensemble("mean", [[0.0, 2.0, 50.0], [1.0, 3.0, 90.0]])
    resumed.load_state_dict(reward.state_dict())
    assert torch.equal(resumed.raw(early.select(torch.tensor([0])))[0], before[:1])


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
