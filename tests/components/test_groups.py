"""Group classifiers: labels, heads, and a head that learns beside given labels."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from gipo_megatron.algorithms.ppo_metrics import split_metrics
from gipo_megatron.components.groups import CriticHead, LabelledGroups, NoGroups, RandomGroups
from gipo_megatron.components.kl import FixedKL
from gipo_megatron.components.tracker import GroupTracker, group_loss_coefficients
from gipo_megatron.components.variance import GroupVariance
from gipo_megatron.errors import UserError
from gipo_megatron.roles import SingleReplica
from tests.small_ppo import SOURCES, make_ppo, rollout_of, scores_of

DP = SingleReplica()


def test_critic_head_by_hand() -> None:
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64).log()
    probs = CriticHead().probs(logits, rollout_of(["a", "b"]))
    assert probs.tolist() == [pytest.approx([0.75, 0.25]), pytest.approx([0.5, 0.5])]
    head = CriticHead(num_groups=3, input="trajectory", beta_critic=0.5, lr=0.1).head
    assert (head.num_groups, head.input, head.loss_weight, head.lr) == (3, "trajectory", 0.5, 0.1)
    assert not head.observes


def test_none_is_one_group_of_certainty() -> None:
    classifier = NoGroups()
    assert classifier.probs(None, rollout_of(["a"] * 3)).tolist() == [[1.0]] * 3
    assert (classifier.num_groups, classifier.head) == (1, None)


def test_labelled_groups_may_be_mapped() -> None:
    classifier = LabelledGroups(groups={"a": 1, "b": 0, "c": 1}, sources=("a", "b", "c"))
    probs = classifier.probs(None, rollout_of(["a", "b", "c"]))
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
    probs = ppo.group_classifier.probs(logits, rollout)
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


def test_random_groups_are_fixed_per_prompt() -> None:
    rollout = rollout_of(["a"] * 4000, list(range(4000)))

    def labels(seed: int) -> torch.Tensor:
        return RandomGroups(num_groups=3, share=0.2, seed=seed).probs(None, rollout).argmax(1)

    assert torch.equal(labels(5), labels(5))
    assert not torch.equal(labels(5), labels(6))
    shares = torch.bincount(labels(5)).double() / 4000
    assert shares.tolist() == pytest.approx([0.2, 0.4, 0.4], abs=0.03)  # 4 standard errors
