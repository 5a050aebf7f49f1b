"""The group tracker: sums, the high group and its hysteresis, metrics, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gipo_megatron.components.tracker import GroupTracker, group_loss_coefficients
from gipo_megatron.errors import UserError
from gipo_megatron.local.replicas import run_replicas
from gipo_megatron.metrics import Metrics
from gipo_megatron.types import Scores
from tests.small_ppo import scores_of


def values(metrics: Metrics) -> dict[str, float]:
    return {name.removeprefix("groups/"): metric.result() for name, metric in metrics.items()}


def probs_of(probs: list[list[float]]) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64)


# ------------------------------------------------------------------------------- the high group


def feed(tracker: GroupTracker, *rounds: tuple[float, float], std: float = 1.0) -> list[int]:
    """The high group after each round of mean scores."""
    high = []
    for scores in rounds:
        tracker.advance(list(scores), [10.0, 10.0], std)
        high.append(tracker.high)
    return high


def settled(num_groups: int = 2) -> GroupTracker:
    """A tracker whose first choice was group 0."""
    tracker = GroupTracker(num_groups)
    tracker.settled = True
    return tracker


def test_the_best_group_is_the_high_one_until_one_leads() -> None:
    """The first choice has no hysteresis, whatever the index; later ones have."""
    for order in ((0, 1), (1, 0)):
        tracker = GroupTracker(2)
        rounds = [(0.0, 0.05), (0.2, 0.0), (0.0, 3.0), (9.0, 0.0)]
        # EMA: 0 0.05 | 0.02 0.045 | 0.018 0.34: settled | 0.916 0.306: a challenger
        swapped = [(pair[order[0]], pair[order[1]]) for pair in rounds]
        assert feed(tracker, *swapped) == [order[1], order[1], order[1], order[1]]
        assert tracker.settled and tracker.flips == 0 and tracker.led == 1


def test_high_changes_after_leading_for_two_iterations() -> None:
    tracker = settled()
    assert feed(tracker, (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)) == [0, 1, 1]
    assert tracker.flips == 1
    assert tracker.means == [0.0, 1.0]


def test_a_small_lead_changes_nothing() -> None:
    assert feed(settled(), *[(0.0, 0.09)] * 10) == [0] * 10
    assert feed(settled(), *[(0.0, 0.09)] * 3, std=0.5) == [0, 1, 1]


def test_a_lead_is_measured_by_the_batchs_own_spread() -> None:
    """Scores that rise from 0 to 1000 have a large std over all history; one batch has 0.5."""
    tracker = settled()
    for level in (0.0, 1000.0, 1000.0):
        raw = torch.tensor([level, level + 1.0])
        scores = scores_of(raw, std=500.0)
        tracker.observe(tracker.measure(probs_of([[1, 0], [0, 1]]), scores), scores, None)
    assert tracker.high == 1


def test_an_interrupted_lead_starts_again() -> None:
    tracker = settled()
    # EMA of group 1: 0.2, then 0.9 * 0.2 - 0.1 * 2 = -0.02, then 0.9 * -0.02 + 0.1 * 3 = 0.282
    assert feed(tracker, (0.0, 0.2), (0.0, -2.0), (0.0, 3.0), (0.0, 0.282)) == [0, 0, 0, 1]


def test_the_mean_is_exponential_and_empty_groups_are_skipped() -> None:
    tracker = GroupTracker(2)
    tracker.advance([1.0, 5.0], [10.0, 0.5], 1.0)
    assert tracker.means == [1.0, None]
    tracker.advance([2.0, 5.0], [10.0, 1.0], 1.0)
    assert tracker.means == [pytest.approx(1.1), 5.0]
    tracker.advance([2.0, 9.0], [10.0, 0.9], 1.0)
    assert tracker.means == [pytest.approx(1.19), 5.0]
    tracker.advance([math.nan, 5.0], [10.0, 2.0], 1.0)
    assert tracker.means == [pytest.approx(1.19), 5.0]


def test_ranks() -> None:
    assert GroupTracker(1).ranks() == [1.0]
    assert GroupTracker(2).ranks() == [1.0, 0.0]
    tracker = GroupTracker(4)
    tracker.means, tracker.high = [0.3, 0.9, None, 0.5], 3  # group 1 leads, but not long enough yet
    assert tracker.ranks() == [pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0, 1.0]


def test_flip_rate() -> None:
    tracker = GroupTracker(2)
    assert math.isnan(tracker.flip_rate([0, 1, 1, 0]))
    assert tracker.flip_rate([0, 1, 0, 1]) == 0.5
    assert tracker.flip_rate([0, 1, 0, 1]) == 0.0


# -------------------------------------------------------------------------------------- one batch


def test_sums_by_hand() -> None:
    raw = torch.tensor([1.0, -1.0], dtype=torch.float64)
    groups = GroupTracker(2).measure(probs_of([[0.75, 0.25], [0.5, 0.5]]), scores_of(raw, std=2.0))
    assert groups.masses.tolist() == pytest.approx([1.25, 0.75])
    assert groups.group_means.tolist() == pytest.approx([0.2, -1 / 3])
    assert groups.high_prob.tolist() == pytest.approx([0.75, 0.5])
    assert (groups.count, groups.high, groups.std, float(groups.mean_score)) == (2, 0, 2.0, 0.0)
    # mass: c_ig = G^2 - (G - R_g)^2
    assert group_loss_coefficients(groups, groups.probs).tolist() == [
        pytest.approx([1 - 0.8**2, 1 - (4 / 3) ** 2]),
        pytest.approx([1 - 1.2**2, 1 - (2 / 3) ** 2]),
    ]


def test_measure_is_pure() -> None:
    tracker = GroupTracker(2)
    arguments = probs_of([[0.7, 0.3], [0.2, 0.8]]), scores_of(torch.tensor([1.0, 2.0]))
    before = tracker.state_dict()
    first, second = tracker.measure(*arguments), tracker.measure(*arguments)
    assert tracker.state_dict() == before
    assert all(
        torch.equal(getattr(first, f), getattr(second, f))
        for f in ("probs", "group_means", "masses", "high_prob")
    )


def test_metrics_are_in_raw_units() -> None:
    """Hard labels; G = 0.5, 1.5 | -2 in units of std 2."""
    tracker = GroupTracker(2)
    standard = torch.tensor([0.5, 1.5, -2.0], dtype=torch.float64)
    scores = Scores(
        raw=standard * 2 + 7, shaped=standard, standardised_scores=standard, parts={}, std=2.0
    )
    groups = tracker.measure(probs_of([[1, 0], [1, 0], [0, 1]]), scores)
    found = values(tracker.observe(groups, scores, None))
    assert found == {
        "gap": 6.0,
        "gap_std": 3.0,
        "variance": pytest.approx(2 / 3 * 1 + 1 / 3 * 4),
        "mass_min": pytest.approx(1 / 3),
        "label_entropy": 0.0,
        "high_index": 0.0,
        "flips": 0.0,
        "return_high": 2.0,
        "return_low": -4.0,
        "return_worst": -4.0,
        "return_0": 2.0,
        "return_1": -4.0,
        "share_0": pytest.approx(2 / 3),
        "share_1": pytest.approx(1 / 3),
    }
    assert tracker.means == [9.0, 3.0]


def test_one_group_of_certainty() -> None:
    tracker, scores = GroupTracker(1), scores_of(torch.tensor([1.0, -2.0, 4.0]))
    groups = tracker.measure(torch.ones(3, 1), scores)
    assert groups.high_prob.tolist() == [1.0] * 3
    found = values(tracker.observe(groups, scores, None))
    names = ("gap", "variance", "mass_min", "return_high", "return_low")
    assert [found[name] for name in names] == [0, 0, 1, 1, 1]


# --------------------------------------------------------------------------- replicas and restarts


def test_observation_does_not_depend_on_the_number_of_replicas() -> None:
    raw = torch.linspace(-2, 3, 8, dtype=torch.float64)
    probe = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def work(dp: Any) -> tuple[dict[str, Any], float]:
        tracker, mine, rate = GroupTracker(2, dp=dp), slice(dp.rank, None, dp.size), math.nan
        for sign in (1, -1):
            scores = scores_of(raw[mine])
            groups = tracker.measure(logits[mine].softmax(-1), scores)
            rate = values(tracker.observe(groups, scores, sign * probe[mine]))["flip_rate"]
        return tracker.state_dict(), rate

    (one, rate) = run_replicas(1, work)[0]
    assert rate == 1.0
    for state, other_rate in run_replicas(4, work):
        assert other_rate == rate
        assert state["means"] == pytest.approx(one["means"], rel=1e-12)
        assert {**state, "means": None} == {**one, "means": None}


def test_a_checkpoint_continues_the_hysteresis() -> None:
    straight, stopped = GroupTracker(2), GroupTracker(2)
    probs = probs_of([[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 2)
    for step in range(3):
        scores = scores_of(torch.tensor([0.0, 0.0, 1.0 + step, 1.0]))
        for tracker in (straight, stopped):
            tracker.observe(tracker.measure(probs, scores), scores, probs.log())
        resumed = GroupTracker(2)
        resumed.load_state_dict(stopped.state_dict())
        stopped = resumed
    assert stopped.state_dict() == straight.state_dict()
    assert straight.high == 1
    with pytest.raises(UserError, match="2 groups, the recipe 3"):
        GroupTracker(3).load_state_dict(straight.state_dict())


def test_a_state_dict_is_a_copy() -> None:
    tracker, scores = GroupTracker(1), scores_of(torch.ones(2))
    state = tracker.state_dict()
    tracker.observe(tracker.measure(torch.ones(2, 1), scores), scores, None)
    assert state["means"] == [None]
