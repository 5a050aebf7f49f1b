"""Group classifiers: labels, heads, and a head that learns beside given labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.algorithms.ppo_metrics import split_metrics
from gipo_megatron.components.groups import (
    CriticHead,
    LabelledGroups,
    NoGroups,
    RandomGroups,
    ValueSplit,
)
from gipo_megatron.components.kl import FixedKL
from gipo_megatron.components.tracker import GroupTracker, group_loss_coefficients
from gipo_megatron.components.variance import GroupVariance
from gipo_megatron.errors import UserError
from gipo_megatron.local.replicas import replica_rows, run_replicas
from gipo_megatron.roles import SingleReplica
from tests.small_ppo import SOURCES, make_ppo, rollout_of, scores_of

DP = SingleReplica()


def test_critic_head_by_hand() -> None:
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64).log()
    probs = CriticHead().probs(logits, None, rollout_of(["a", "b"]))
    assert probs.tolist() == [pytest.approx([0.75, 0.25]), pytest.approx([0.5, 0.5])]
    head = CriticHead(num_groups=3, input="trajectory", beta_critic=0.5, lr=0.1).head
    assert (head.num_groups, head.input, head.loss_weight, head.lr) == (3, "trajectory", 0.5, 0.1)
    assert not head.observes


def between_variance(values: list[float], high: list[bool]) -> float:
    """rho_1 rho_2 (mean_1 - mean_2)^2 of a partition; 0 with an empty part."""
    parts = [[v for v, h in zip(values, high, strict=True) if h is side] for side in (True, False)]
    if not all(parts):
        return 0.0
    means = [sum(part) / len(part) for part in parts]
    shares = [len(part) / len(values) for part in parts]
    return shares[0] * shares[1] * (means[0] - means[1]) ** 2


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_value_split_is_the_best_split(seed: int, size: int) -> None:
    """Of all 2^6 partitions of the prompts, thresholds among them, over rows of unequal number."""
    generator = torch.Generator().manual_seed(seed)
    of_prompt = torch.randn(6, generator=generator)
    ids = [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5, 5]
    rollout = rollout_of(["a"] * 12, ids)
    values = torch.full((12, 3), 9.0)  # of other states, not read
    values[:, 1] = of_prompt[ids]

    def work(dp: Any) -> Tensor:
        mine = slice(dp.rank, None, dp.size)
        return ValueSplit(dp=dp).probs(None, values[mine], replica_rows(rollout, dp))

    labels = torch.empty(12, 2)
    for rank, part in enumerate(run_replicas(size, work)):
        labels[rank::size] = part
    rows = of_prompt[ids].tolist()
    found = (labels[:, 0] == 1).tolist()
    best = max(between_variance(rows, [bool(mask >> i & 1) for i in ids]) for mask in range(2**6))
    assert between_variance(rows, found) == pytest.approx(best, rel=1e-6)
    assert min(v for v, h in zip(rows, found, strict=True) if h) > max(
        v for v, h in zip(rows, found, strict=True) if not h
    )


def test_value_split_of_equal_values_is_one_group() -> None:
    """Also where rows of one prompt differ by rounding."""
    rollout = rollout_of(["a"] * 4, [3, 3, 3, 3])
    values = torch.zeros(4, 3)
    values[:, 1] = torch.tensor([0.5, 0.5000001, 0.4999999, 0.5])
    labels = ValueSplit(dp=DP).probs(None, values, rollout)
    assert labels.tolist() == [[0.0, 1.0]] * 4
    assert ops.otsu_threshold(torch.full((3,), 2.0), torch.ones(3)) == 2.0


def test_value_split_runs_on_the_page() -> None:
    ppo = make_ppo(DP, ValueSplit(dp=DP), GroupVariance(), FixedKL())
    for step in range(2):
        metrics = ppo.step(step).metrics
    assert 0 < metrics["groups/mass_min"].result() <= 0.5
    assert metrics["groups/label_entropy"].result() == 0
    assert "groups/flip_rate" not in metrics


def test_labels_that_need_a_response_have_no_flips_on_the_probe() -> None:
    """The probe has prompts alone: a head on the last token was never trained there."""
    for where, measured in (("prompt", True), ("trajectory", False)):
        ppo = make_ppo(DP, CriticHead(input=where), GroupVariance(), FixedKL())
        assert ("groups/flip_rate" in ppo.step(0).metrics) is measured


def test_none_is_one_group_of_certainty() -> None:
    classifier = NoGroups()
    assert classifier.probs(None, None, rollout_of(["a"] * 3)).tolist() == [[1.0]] * 3
    assert (classifier.num_groups, classifier.head) == (1, None)


def test_labelled_groups_may_be_mapped() -> None:
    classifier = LabelledGroups(groups={"a": 1, "b": 0, "c": 1}, sources=("a", "b", "c"))
    probs = classifier.probs(None, None, rollout_of(["a", "b", "c"]))
    assert probs.argmax(1).tolist() == [1, 0, 1]
    assert classifier.num_groups == 2


def test_a_head_learns_beside_given_labels() -> None:
    """Given labels are used; the head learns as critic_head does, and is compared with them."""
    ppo = make_ppo(DP, LabelledGroups(sources=SOURCES), GroupVariance(), FixedKL())
    assert ppo.observer is not None
    rollout = rollout_of(["easy", "easy", "hard", "hard"])
    scores = scores_of(torch.tensor([2.0, 1.0, -1.0, 0.0], dtype=torch.float64))
    learned_probs = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]  # hard labels 0 0 1 0
    logits = torch.tensor(learned_probs, dtype=torch.float64).log()
    probs = ppo.group_classifier.probs(logits, None, rollout)
    assert probs.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]

    groups = ppo.tracker.measure(probs.double(), scores)
    learned = ppo._learned_groups(groups, logits, scores)
    alone = GroupTracker(2).measure(logits.softmax(-1), scores)
    assert learned is not None and learned is not groups
    assert torch.equal(
        group_loss_coefficients(learned, learned.probs), group_loss_coefficients(alone, alone.probs)
    )

    found = split_metrics(learned, scores, rollout, SOURCES, DP)
    ami = adjusted_mutual_info_score([0, 0, 1, 1], [0, 0, 1, 0])
    assert found["groups/ami"].result() == pytest.approx(ami)
    # p_high of easy 0.9, 0.6 against 0.2, 0.7 of hard: three of four pairs in order
    assert found["groups/auc"].result() == 0.75

    metrics = ppo._observe(groups, learned, scores, torch.zeros(4))
    assert math.isnan(metrics["groups/flip_rate"].result())  # the observer's, the first time
    assert ppo.tracker.means == [1.5, -0.5]
    assert ppo.observer.means != ppo.tracker.means and ppo.observer.probe is not None
    assert {"groups", "observer", "reward"} == ppo.state_dict().keys()


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
        LabelledGroups(groups=mapping, sources=sources)


def test_the_auc_keeps_its_sign_when_the_sources_scores_cross() -> None:
    """Labels that stay, and mean scores of the two sources that change places."""
    rollout = rollout_of(["easy", "easy", "hard", "hard"])
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]], dtype=torch.float64)
    for raw in ([1.0, 1.1, 0.0, 0.1], [0.0, 0.1, 1.0, 1.1]):
        scores = scores_of(torch.tensor(raw, dtype=torch.float64))
        groups = GroupTracker(2).measure(probs, scores)
        found = split_metrics(groups, scores, rollout, SOURCES, DP)
        assert found["groups/auc"].result() == 1.0


def test_random_groups_are_fixed_per_prompt() -> None:
    rollout = rollout_of(["a"] * 4000, list(range(4000)))

    def labels(seed: int) -> torch.Tensor:
        return RandomGroups(num_groups=3, share=0.2, seed=seed).probs(None, None, rollout).argmax(1)

    assert torch.equal(labels(5), labels(5))
    assert not torch.equal(labels(5), labels(6))
    shares = torch.bincount(labels(5)).double() / 4000
    assert shares.tolist() == pytest.approx([0.2, 0.4, 0.4], abs=0.03)  # 4 standard errors
