"""Variance regularisers against hand-worked batches. Exact limits are in tests/test_theorems.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gipo_megatron import ops
from gipo_megatron.components.variance import (
    CVaR,
    GroupDRO,
    GroupVariance,
    NoVariance,
    ReturnVariance,
)
from gipo_megatron.roles import SingleReplica
from gipo_megatron.types import Groups


def two_groups(returns: list[float], first: int, kind: str = "mass") -> Groups:
    """Hard labels: the first `first` rows are group 0."""
    g = torch.tensor(returns, dtype=torch.float64)
    probs = torch.zeros(len(g), 2, dtype=torch.float64)
    probs[:first, 0] = probs[first:, 1] = 1
    r, masses, mean, count = ops.group_means(ops.group_sums(probs, g))
    return Groups(probs, probs[:, 0], g, r, masses, mean, count, 0, 1.0, kind)


def test_none_is_one() -> None:
    weights = NoVariance().weights(two_groups([1, 2, 3], 1))
    assert weights.values.tolist() == [1, 1, 1]


def test_group_variance_by_hand() -> None:
    """G = 1, 1, -1, 0: R = 1, -1/2, R_all = 1/4. mass: 1 - 2 beta (R_g - 1/4); uniform: 1 - beta
    (R_g - 1/4) / rho_g, rho = 1/2."""
    for kind in ("mass", "uniform"):
        weights = GroupVariance(beta=0.4).weights(two_groups([1, 1, -1, 0], 2, kind))
        assert weights.raw.tolist() == pytest.approx([0.4, 0.4, 1.6, 1.6])


def test_weights_are_clamped_and_the_raw_ones_kept() -> None:
    groups = two_groups([2, 2, -2, -2], 2)
    weights = GroupVariance(beta=1.0).weights(groups)
    assert weights.raw.tolist() == [-3, -3, 5, 5]
    assert weights.values.tolist() == pytest.approx([0.1, 0.1, 3, 3])
    assert GroupVariance(beta=1.0, min_weight=-1, max_weight=4).weights(groups).values.tolist() == [
        -1,
        -1,
        4,
        4,
    ]


@pytest.mark.parametrize("cls", [GroupVariance, ReturnVariance, GroupDRO])
def test_the_kl_coefficient_is_divided_by_the_weight(cls: Any) -> None:
    """Or not, with weigh_kl; then a weight may be 0 or below."""
    groups = two_groups([1, 1, -1, 0], 2)
    weights = cls().weights(groups)
    assert torch.equal(weights.kl_divisor, weights.values)
    assert not (weights.values == 1).any()
    assert (cls(weigh_kl=True).weights(groups).kl_divisor == 1).all()
    refused = [error.where for error in cls(min_weight=0.0).problems()]
    assert refused == ["variance_regulariser.min_weight"]
    assert not [*cls().problems(), *cls(min_weight=-1.0, weigh_kl=True).problems()]


def test_argmax_labels_by_hand() -> None:
    """G = 1, 1, -1, 0 and labels 0, 0, 1, 1: as in the first test, however soft they are."""
    groups = two_groups([1, 1, -1, 0], 2)
    soft = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], dtype=torch.float64)
    r, masses, mean, count = ops.group_means(ops.group_sums(soft, groups.sample_scores))
    learned = Groups(soft, soft[:, 0], groups.sample_scores, r, masses, mean, count, 0, 1.0)
    hard = GroupVariance(beta=0.4, labels="argmax", dp=SingleReplica())
    assert hard.weights(learned).raw.tolist() == pytest.approx([0.4, 0.4, 1.6, 1.6])
    assert GroupVariance(beta=0.4).weights(learned).raw.tolist() != pytest.approx(
        [0.4, 0.4, 1.6, 1.6]
    )


def test_a_group_below_one_sequence_switches_the_weights_off() -> None:
    groups = two_groups([1, 1, -1, 0], 2)
    # masses 0.9, 3.1
    soft = torch.tensor([[0.3, 0.7], [0.3, 0.7], [0.2, 0.8], [0.1, 0.9]], dtype=torch.float64)
    r, masses, mean, count = ops.group_means(ops.group_sums(soft, groups.sample_scores))
    small = Groups(soft, soft[:, 0], groups.sample_scores, r, masses, mean, count, 0, 1.0)
    assert (GroupVariance(beta=1.0).weights(small).values == 1).all()
    assert (GroupDRO().weights(small).values == 1).all()


def test_return_variance_by_hand() -> None:
    weights = ReturnVariance(beta=0.25).weights(two_groups([2, 1, 0, -3], 2))
    assert weights.raw.tolist() == [0.0, 0.5, 1.0, 2.5]


def test_group_dro_by_hand() -> None:
    """q proportional to exp(-a R): R = 1, -1, a = 0.5; w = q_g / rho_g. The second batch multiplies
    on."""
    groups = two_groups([1, 1, -1, -1], 2)
    regulariser = GroupDRO(step=0.5)
    worst = 1 / (1 + math.exp(-1.0))
    assert regulariser.weights(groups).raw.tolist() == pytest.approx(
        [2 * (1 - worst)] * 2 + [2 * worst] * 2
    )
    regulariser.observe(groups, 0.0)
    resumed = GroupDRO(step=0.5)
    resumed.load_state_dict(regulariser.state_dict())
    worst = 1 / (1 + math.exp(-2.0))
    assert resumed.weights(groups).raw.tolist() == pytest.approx(
        [2 * (1 - worst)] * 2 + [2 * worst] * 2
    )


def test_cvar_by_hand() -> None:
    groups = two_groups([3, 1, 2, 0], 2)
    assert CVaR(alpha=0.5, dp=SingleReplica()).weights(groups).raw.tolist() == [0, 2, 0, 2]
    assert CVaR(alpha=0.375, dp=SingleReplica()).weights(groups).raw.tolist() == pytest.approx(
        [0, 4 / 3, 0, 8 / 3]
    )
    assert CVaR(alpha=1.0, dp=SingleReplica()).weights(groups).raw.tolist() == [1, 1, 1, 1]
