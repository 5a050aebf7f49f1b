"""Group classifiers: labels, the high group and its hysteresis, metrics, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from gipo_megatron.algorithms.ppo_metrics import split_metrics
from gipo_megatron.components.groups import (
    CriticHead,
    LabelledGroups,
    Memory,
    NoGroups,
    RandomGroups,
)
from gipo_megatron.errors import UserError
from gipo_megatron.roles import SingleReplica
from gipo_megatron.types import Groups, Metrics, Scores
from tests.small_ppo import rollout_of, scores_of
from tests.torch_roles import replica_rows, run_replicas

DP = SingleReplica()


def values(metrics: Metrics) -> dict[str, float]:
    return {name.removeprefix("groups/"): metric.result() for name, metric in metrics.items()}


def logits_of(probs: list[list[float]]) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


# ------------------------------------------------------------------------------------------- memory


def feed(memory: Memory, *rounds: tuple[float, float], std: float = 1.0) -> list[int]:
    """The high group after each round of mean scores."""
    high = []
    for scores in rounds:
        memory.observe(list(scores), [10.0, 10.0], std)
        high.append(memory.high)
    return high


def test_high_changes_after_leading_for_two_iterations() -> None:
    memory = Memory(2)
    assert feed(memory, (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)) == [0, 1, 1]
    assert memory.flips == 1
    assert memory.means == [0.0, 1.0]


def test_a_small_lead_changes_nothing() -> None:
    assert feed(Memory(2), *[(0.0, 0.09)] * 10) == [0] * 10
    assert feed(Memory(2), *[(0.0, 0.09)] * 3, std=0.5) == [0, 1, 1]


def test_an_interrupted_lead_starts_again() -> None:
    memory = Memory(2)
    # EMA of group 1: 0.2, then 0.9 * 0.2 - 0.1 * 2 = -0.02, then 0.9 * -0.02 + 0.1 * 3 = 0.282
    assert feed(memory, (0.0, 0.2), (0.0, -2.0), (0.0, 3.0), (0.0, 0.282)) == [0, 0, 0, 1]


def test_the_mean_is_exponential_and_empty_groups_are_skipped() -> None:
    memory = Memory(2)
    memory.observe([1.0, 5.0], [10.0, 0.5], 1.0)
    assert memory.means == [1.0, None]
    memory.observe([2.0, 5.0], [10.0, 1.0], 1.0)
    assert memory.means == [pytest.approx(1.1), 5.0]
    memory.observe([2.0, 9.0], [10.0, 0.9], 1.0)
    assert memory.means == [pytest.approx(1.19), 5.0]


def test_ranks() -> None:
    assert Memory(1).ranks() == [1.0]
    assert Memory(2).ranks() == [1.0, 0.0]
    memory = Memory(4)
    memory.means, memory.high = [0.3, 0.9, None, 0.5], 3  # group 1 leads, but not long enough yet
    assert memory.ranks() == [pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0, 1.0]


def test_flip_rate() -> None:
    memory = Memory(2)
    assert math.isnan(memory.flip_rate([0, 1, 1, 0]))
    assert memory.flip_rate([0, 1, 0, 1]) == 0.5
    assert memory.flip_rate([0, 1, 0, 1]) == 0.0


# -------------------------------------------------------------------------------------- classifiers


def test_critic_head_by_hand() -> None:
    classifier = CriticHead(dp=DP)
    raw = torch.tensor([1.0, -1.0], dtype=torch.float64)
    groups = classifier.assign(
        logits_of([[0.75, 0.25], [0.5, 0.5]]), rollout_of(["a", "b"]), scores_of(raw, std=2.0)
    )
    assert groups.probs.tolist() == [pytest.approx([0.75, 0.25]), pytest.approx([0.5, 0.5])]
    assert groups.masses.tolist() == pytest.approx([1.25, 0.75])
    assert groups.returns.tolist() == pytest.approx([0.2, -1 / 3])
    assert groups.high_prob.tolist() == pytest.approx([0.75, 0.5])
    assert (groups.count, groups.high, groups.std, float(groups.mean_return)) == (2, 0, 2.0, 0.0)
    # mass: c_ig = G^2 - (G - R_g)^2
    assert classifier.coefficients(groups).tolist() == [
        pytest.approx([1 - 0.8**2, 1 - (4 / 3) ** 2]),
        pytest.approx([1 - 1.2**2, 1 - (2 / 3) ** 2]),
    ]


def test_assign_is_pure() -> None:
    classifier = CriticHead(dp=DP)
    arguments = (
        logits_of([[0.7, 0.3], [0.2, 0.8]]),
        rollout_of(["a", "b"]),
        scores_of(torch.tensor([1.0, 2.0])),
    )
    before = classifier.state_dict()
    first, second = classifier.assign(*arguments), classifier.assign(*arguments)
    assert classifier.state_dict() == before
    assert all(
        torch.equal(getattr(first, f), getattr(second, f))
        for f in ("probs", "returns", "masses", "high_prob")
    )


def test_metrics_are_in_raw_units() -> None:
    """Hard labels; G = 0.5, 1.5 | -2 in units of std 2."""
    classifier = LabelledGroups(dp=DP, sources=("easy", "hard"))
    returns = torch.tensor([0.5, 1.5, -2.0], dtype=torch.float64)
    scores = Scores(raw=returns * 2 + 7, shaped=returns, returns=returns, parts={}, std=2.0)
    groups = classifier.assign(torch.zeros(3, 2), rollout_of(["easy", "easy", "hard"]), scores)
    found = values(classifier.observe(groups, scores, None))
    assert found == {
        "gap": 6.0,
        "gap_std": 3.0,
        "variance": pytest.approx(2 / 3 * 1 + 1 / 3 * 4),
        "mass_min": pytest.approx(1 / 3),
        "label_entropy": 0.0,
        "high_index": 0.0,
        "flips": 0.0,
        "flip_rate": 0.0,
        "return_high": 2.0,
        "return_low": -4.0,
        "return_worst": -4.0,
        "return_0": 2.0,
        "return_1": -4.0,
        "share_0": pytest.approx(2 / 3),
        "share_1": pytest.approx(1 / 3),
    }
    assert classifier.state_dict()["means"] == [9.0, 3.0]


def test_none_is_one_group_of_certainty() -> None:
    classifier = NoGroups(dp=DP)
    scores = scores_of(torch.tensor([1.0, -2.0, 4.0]))
    groups = classifier.assign(None, rollout_of(["a"] * 3), scores)
    assert groups.probs.tolist() == [[1.0]] * 3
    assert groups.high_prob.tolist() == [1.0] * 3
    assert (classifier.coefficients(groups) == 0).all()
    assert classifier.head is None
    found = values(classifier.observe(groups, scores, None))
    assert (
        found["gap"],
        found["variance"],
        found["mass_min"],
        found["return_high"],
        found["return_low"],
    ) == (0, 0, 1, 1, 1)


def test_labelled_groups_may_be_mapped() -> None:
    classifier = LabelledGroups(groups={"a": 1, "b": 0, "c": 1}, dp=DP, sources=("a", "b", "c"))
    groups = classifier.assign(
        torch.zeros(3, 2), rollout_of(["a", "b", "c"]), scores_of(torch.zeros(3))
    )
    assert groups.probs.argmax(1).tolist() == [1, 0, 1]


def test_a_head_learns_beside_given_labels() -> None:
    """It is critic_head's in all but its effect: given labels are used, learned ones are measured
    against them."""
    oracle, alone = (
        LabelledGroups(dp=DP, sources=("easy", "hard")),
        CriticHead(detach_trunk=True, dp=DP),
    )
    rollout = rollout_of(["easy", "easy", "hard", "hard"])
    scores = scores_of(torch.tensor([2.0, 1.0, -1.0, 0.0], dtype=torch.float64))
    logits = logits_of([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])  # hard labels 0 0 1 0
    groups, learned = oracle.assign(logits, rollout, scores), alone.assign(logits, rollout, scores)
    assert groups.probs.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]] and oracle.head == alone.head
    assert torch.equal(oracle.coefficients(groups), alone.coefficients(learned))

    found = values(split_metrics(groups, scores, rollout, ("easy", "hard"), DP))
    assert found["ami"] == pytest.approx(adjusted_mutual_info_score([0, 0, 1, 1], [0, 0, 1, 0]))
    # p_high of easy 0.9, 0.6 against 0.2, 0.7 of hard: three of four pairs in order
    assert found["auc"] == 0.75

    mine = oracle.observe(groups, scores, logits)
    alone.observe(learned, scores, logits)
    assert math.isnan(mine["groups/flip_rate"].result())
    assert oracle.state_dict()["means"] == [1.5, -0.5]
    assert oracle.state_dict()["observer"] == alone.state_dict()
    resumed = LabelledGroups(dp=DP, sources=("easy", "hard"))
    resumed.load_state_dict(oracle.state_dict())
    assert resumed.state_dict() == oracle.state_dict()


@pytest.mark.parametrize(
    ("mapping", "sources", "message"),
    [
        ({}, ("a",), "two sources"),
        ({"a": 0}, ("a", "b"), "no group for source b"),
        ({"a": 0, "b": 2}, ("a", "b"), r"\[0, 2\]"),
    ],
)
def test_labels_that_do_not_fit_the_data(
    mapping: dict[str, int], sources: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        LabelledGroups(groups=mapping, dp=DP, sources=sources)


@pytest.mark.parametrize(
    "settings",
    [{"variance": "robust"}, {"input": "response"}, {"num_groups": 0}, {"init_std": 0.0}],
)
def test_bad_settings_are_explained(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        CriticHead(dp=DP, **settings)
    assert error.value.where == f"group_classifier.{next(iter(settings))}"


def test_random_groups_are_fixed_per_prompt() -> None:
    ids = list(range(4000))
    rollout = rollout_of(["a"] * 4000, ids)
    scores = scores_of(torch.zeros(4000))
    labels = (
        RandomGroups(num_groups=3, share=0.2, seed=5, dp=DP)
        .assign(None, rollout, scores)
        .probs.argmax(1)
    )
    again = (
        RandomGroups(num_groups=3, share=0.2, seed=5, dp=DP)
        .assign(None, rollout, scores)
        .probs.argmax(1)
    )
    other = (
        RandomGroups(num_groups=3, share=0.2, seed=6, dp=DP)
        .assign(None, rollout, scores)
        .probs.argmax(1)
    )
    assert torch.equal(labels, again)
    assert not torch.equal(labels, other)
    shares = torch.bincount(labels).double() / 4000
    assert shares.tolist() == pytest.approx([0.2, 0.4, 0.4], abs=0.03)  # 4 standard errors


# ---------------------------------------------------------------- memory over replicas and restarts


def test_observation_does_not_depend_on_the_number_of_replicas() -> None:
    raw = torch.linspace(-2, 3, 8, dtype=torch.float64)
    rollout, probe = (
        rollout_of(["a", "b"] * 4),
        torch.randn(8, 2, generator=torch.Generator().manual_seed(0)),
    )
    logits = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def work(dp: Any) -> tuple[dict[str, Any], float]:
        classifier = CriticHead(dp=dp)
        rate = math.nan
        for sign in (1, -1):
            scores = scores_of(raw[dp.rank :: dp.size])
            groups: Groups = classifier.assign(
                logits[dp.rank :: dp.size], replica_rows(rollout, dp), scores
            )
            rate = values(classifier.observe(groups, scores, sign * probe[dp.rank :: dp.size]))[
                "flip_rate"
            ]
        return classifier.state_dict(), rate

    one, rate = work(DP)
    assert rate == 1.0
    for state, other_rate in run_replicas(4, work):
        assert other_rate == rate
        assert state["means"] == pytest.approx(one["means"], rel=1e-12)
        assert {**state, "means": None} == {**one, "means": None}


def test_a_checkpoint_continues_the_hysteresis() -> None:
    straight, stopped = CriticHead(dp=DP), CriticHead(dp=DP)
    rollout, logits = rollout_of(["a"] * 4), logits_of([[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 2)
    for step in range(3):
        scores = scores_of(torch.tensor([0.0, 0.0, 1.0 + step, 1.0]))
        for classifier in (straight, stopped):
            classifier.observe(classifier.assign(logits, rollout, scores), scores, logits)
        resumed = CriticHead(dp=DP)
        resumed.load_state_dict(stopped.state_dict())
        stopped = resumed
    assert stopped.state_dict() == straight.state_dict()
    assert straight.state_dict()["high"] == 1
    with pytest.raises(UserError, match="2 groups, the recipe 3"):
        CriticHead(num_groups=3, dp=DP).load_state_dict(straight.state_dict())


def test_a_state_dict_is_a_copy() -> None:
    classifier, scores = NoGroups(dp=DP), scores_of(torch.ones(2))
    state = classifier.state_dict()
    classifier.observe(classifier.assign(None, rollout_of(["a"] * 2), scores), scores, None)
    assert state["means"] == [None]
