"""Every formula against numbers found another way: by hand, brute force, autograd, numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gipo_megatron import ops


def identity(x: Tensor) -> Tensor:
    return x


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged_mask(rows: int = 5, length: int = 7) -> Tensor:
    """Contiguous responses of different prompts and lengths, one of them empty."""
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for b, (start, stop) in enumerate([(1, 4), (2, 7), (3, 4), (1, 1), (4, 7)]):
        mask[b, start:stop] = True
    return mask


def test_sequence_sum_ignores_nan_outside_the_mask() -> None:
    x = torch.tensor([[1.0, math.nan, 3.0], [4.0, 5.0, math.nan]])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert ops.sequence_sum(x, mask).tolist() == [4.0, 9.0]


def test_score_lands_on_the_last_token() -> None:
    mask = ragged_mask()
    x = ops.add_on_last_token(torch.zeros(5, 7), mask, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert [(b, t, float(x[b, t])) for b, t in x.nonzero().tolist()] == [
        (0, 3, 1.0),
        (1, 6, 2.0),
        (2, 3, 3.0),
        (4, 6, 5.0),
    ]


def test_whiten_is_numpy_over_the_masked_entries() -> None:
    x, mask = 3 + 2 * noise(0, 5, 7), ragged_mask()
    kept = x[mask].numpy()
    expected = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8)
    white = ops.whiten(x, mask, identity)
    np.testing.assert_allclose(white[mask].numpy(), expected, rtol=1e-12)
    assert (white[~mask] == 0).all()


def test_whiten_of_an_empty_batch_is_zero() -> None:
    assert (ops.whiten(noise(1, 2, 3), torch.zeros(2, 3, dtype=torch.bool), identity) == 0).all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_gae_is_the_double_sum(gamma: float, lam: float) -> None:
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, written out; nothing is worth anything after the
    last token."""
    rewards, values, mask = noise(2, 5, 7), noise(3, 5, 7), ragged_mask()
    advantages, returns = ops.gae(rewards, values, mask, gamma, lam)
    checked = 0
    for b in range(5):
        at = mask[b].nonzero()[:, 0].tolist()
        v = [float(values[b, t]) for t in at] + [0.0]
        delta = [float(rewards[b, t]) + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            expected = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
            assert float(advantages[b, t]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[b, t]) == pytest.approx(expected + v[i], abs=1e-12)
            checked += 1
    assert checked == int(mask.sum())
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


class Accelerator(TorchFunctionMode):
    """Meta tensors stand for those of an accelerator: `.cpu()` gives their contents, and what else
    is done to them is listed."""

    def __init__(self, contents: list[Tensor]) -> None:
        super().__init__()
        self.there = [torch.empty_like(x, device="meta") for x in contents]
        self.contents = {id(t): x for t, x in zip(self.there, contents, strict=True)}
        self.back: list[Tensor] = []
        self.operations: list[str] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if func is Tensor.cpu and id(args[0]) in self.contents:
            return self.contents[id(args[0])]
        if func is Tensor.to and args[1] == torch.device("meta"):
            self.back.append(args[0])
        elif any(id(x) in self.contents for x in args) and name != "__get__":  # attributes are free
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


def test_gae_computes_on_the_host() -> None:
    """An accelerator sees three copies and no arithmetic, and the results are those of the host,
    bit by bit."""
    rewards, values, mask = noise(2, 5, 7).float(), noise(3, 5, 7).float(), ragged_mask()
    expected = ops.gae(rewards, values, mask, 0.97, 0.9)
    with Accelerator([rewards, values, mask]) as accelerator:
        advantages, returns = ops.gae(*accelerator.there, 0.97, 0.9)
    assert accelerator.operations == [] and advantages.is_meta and returns.is_meta
    assert len(accelerator.back) == 2 and all(
        torch.equal(a, b) for a, b in zip(accelerator.back, expected, strict=True)
    )


def test_kl_estimators_have_the_right_mean() -> None:
    """Under pi, k1 and k3 average to the exact KL (enumerated); k2 = k1^2 / 2."""
    pi, ref = noise(4, 6).log_softmax(0), noise(5, 6).log_softmax(0)
    exact = float((pi.exp() * (pi - ref)).sum())
    for kind in ("k1", "k3"):
        assert float((pi.exp() * ops.kl_estimate(pi, ref, kind)).sum()) == pytest.approx(
            exact, rel=1e-12
        )
    assert torch.equal(ops.kl_estimate(pi, ref, "k2"), (pi - ref) ** 2 / 2)
    assert (ops.kl_estimate(pi, ref, "k3") >= 0).all()
    with pytest.raises(ValueError, match="k4"):
        ops.kl_estimate(pi, ref, "k4")


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 1.0, -1.2),
        (0.5, 1.0, -0.5),
        (1.5, -1.0, 1.5),
        (0.5, -1.0, 0.8),
        (1.1, 2.0, -2.2),
        (1.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, expected: float) -> None:
    loss = ops.clipped_surrogate(
        torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), 0.2
    )
    assert float(loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [(1.0, 0.0, 1.0, 0.32), (0.1, 0.0, 1.0, 0.405), (-1.0, 0.0, 1.0, 2.0), (0.5, 0.5, 0.5, 0.0)],
)
def test_clipped_value_loss_by_hand(
    value: float, old: float, target: float, expected: float
) -> None:
    loss = ops.clipped_value_loss(
        torch.tensor([value]), torch.tensor([old]), torch.tensor([target]), 0.2
    )
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_group_sums_by_hand() -> None:
    probs, returns = (
        torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]]),
        torch.tensor([2.0, -1.0, 1.0]),
    )
    sums = ops.group_sums(probs, returns)
    assert sums.tolist() == [1.25, 1.75, 1.0, 1.0, 3.0, 2.0]
    group, masses, mean, count = ops.group_means(sums)
    assert group.tolist() == pytest.approx([0.8, 1 / 1.75])
    assert masses.tolist() == [1.25, 1.75]
    assert (float(mean), count) == (pytest.approx(2 / 3), 3)
    rho = masses / 3
    assert float(ops.group_variance(group, rho, mean, "uniform")) == pytest.approx(
        np.var([0.8, 1 / 1.75])
    )
    by_hand = 1.25 / 3 * (0.8 - 2 / 3) ** 2 + 1.75 / 3 * (1 / 1.75 - 2 / 3) ** 2
    assert float(ops.group_variance(group, rho, mean, "mass")) == pytest.approx(by_hand)


def test_unknown_variance_is_an_error() -> None:
    two = torch.ones(2, dtype=torch.float64)
    for call in (
        lambda: ops.group_variance(two, two, two[0], "robust"),
        lambda: ops.group_loss_coefficients(two, two, two, 2, "robust"),
        lambda: ops.group_weights(torch.ones(2, 2), two, two, two[0], 0.3, "robust"),
    ):
        with pytest.raises(ValueError, match="robust"):
            call()


def test_standardised_scores() -> None:
    raw = torch.tensor([1.0, 2.0, 30.0], dtype=torch.float64)
    assert ops.standardised_scores(raw, 2.0, 0.5).tolist() == [-2.0, 0.0, 3.0]
    assert ops.standardised_scores(raw, 2.0, 9e-7).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("low", "high"), [(0.1, 3.0), (0.0, 1.2), (0.5, 10.0)])
def test_with_mean_one_is_the_nearest_point(low: float, high: float) -> None:
    """By the Karush-Kuhn-Tucker conditions, which are sufficient for a convex problem: one shift
    between the bounds, and at a bound a shift that would lead beyond it."""
    x = noise(7, 12).exp() * 2
    found = ops.with_mean_one(x, low, high)
    assert float(found.mean()) == pytest.approx(1, abs=1e-12)
    inside = (found > low) & (found < high)
    shifts = (found - x)[inside]
    assert len(shifts) and float(shifts.max() - shifts.min()) < 1e-12
    shifted = x + shifts[0]
    assert (shifted[found == low] <= low).all() and (shifted[found == high] >= high).all()
    assert int(inside.sum() + (found == low).sum() + (found == high).sum()) == 12


def test_between_share_by_hand() -> None:
    """Prompts 0, 2 and 10, 12: means 1 and 11, within 2, MS_between 100, so s_b^2 = 49."""
    prompts = torch.tensor([7, 7, 3, 3])
    share = ops.between_share(torch.tensor([0.0, 2.0, 10.0, 12.0]), prompts)
    assert float(share) == pytest.approx(49 / 51)
    assert float(ops.between_share(torch.tensor([0.0, 2.0, 2.0, 0.0]), prompts)) == 0
    assert ops.between_share(torch.arange(4.0), torch.arange(4)).isnan()
    assert ops.between_share(torch.arange(4.0), torch.zeros(4)).isnan()


def test_between_share_finds_the_planted_share() -> None:
    """Offsets of standard deviation 2 and noise of 1: 4 / 5; also with unequal numbers of rows."""
    prompts = torch.arange(4000).repeat_interleave(3)[:-1]
    raw = 2 * noise(8, 4000)[prompts] + noise(9, len(prompts))
    assert float(ops.between_share(raw, prompts)) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.004, 1.0])
def test_lower_tail_weights(alpha: float) -> None:
    """Against the definition: sort, take alpha N rows from below, the last one in part; equal rows
    get equal weights."""
    x = noise(6, 200).mul(4).round().div(4)  # many ties
    weights = ops.lower_tail_weights(x, x, alpha)
    order = x.argsort()
    taken = torch.clamp(alpha * len(x) - torch.arange(len(x), dtype=torch.float64), 0, 1) / alpha
    by_row = torch.zeros_like(x)
    by_row[order] = taken
    expected = torch.stack([by_row[x == value].mean() for value in x])
    torch.testing.assert_close(weights, expected)
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-12)


def test_auc_is_sklearns_within_every_cluster() -> None:
    x, cluster = noise(7, 80).mul(2).round(), torch.arange(80) % 3 * 5
    positive = (noise(8, 80) + 0.3 * x) > 0
    positive[cluster == 10] = True
    found = ops.auc(positive, x, cluster)
    assert found.shape == (3,)
    for k in (0, 1):
        rows = cluster == 5 * k
        assert float(found[k]) == pytest.approx(
            roc_auc_score(positive[rows].numpy(), x[rows].numpy()), abs=1e-12
        )
    assert math.isnan(float(found[2]))


def test_auc_counts_what_rounding_alone_sets_apart_as_equal() -> None:
    """By hand: 0.5 and 0.5 + 1e-8 tie, in whatever order; 0.5 and 0.6 do not. Other clusters'
    values do not close a gap."""
    x = torch.tensor([0.5, 0.5 + 6e-8, 0.5, 0.6, 0.55], dtype=torch.float64)
    cluster = torch.tensor([0, 0, 1, 1, 2])
    positive = torch.tensor([True, False, True, False, True])
    assert ops.auc(positive, x, cluster).tolist()[:2] == [0.0, 0.0]
    assert ops.auc(positive, x, cluster, tie=1e-6).tolist()[:2] == [0.5, 0.0]
    assert ops.auc(~positive, x, cluster, tie=1e-6).tolist()[:2] == [0.5, 1.0]


def test_dpo_loss_by_hand() -> None:
    """-log sigmoid(x) = log(1 + e^-x), at h = 3, 0, -2; with 10 % of the labels wrong, that share
    of the other sign's."""
    h, beta = torch.tensor([3.0, 0.0, -2.0], dtype=torch.float64), 0.5
    right = [math.log1p(math.exp(-1.5)), math.log(2), math.log1p(math.exp(1.0))]
    wrong = [math.log1p(math.exp(1.5)), math.log(2), math.log1p(math.exp(-1.0))]
    assert ops.preference_loss(h, beta).tolist() == pytest.approx(right)
    assert ops.preference_loss(h, beta, 0.1).tolist() == pytest.approx(
        [0.9 * a + 0.1 * b for a, b in zip(right, wrong, strict=True)]
    )


def test_smoothed_dpo_is_least_where_the_policy_is_as_sure_as_the_labels() -> None:
    """sigmoid(beta h) = 1 - eps there: by autograd the slope is 0 at h = log((1 - eps) / eps) /
    beta, and below 0 for any h without eps."""
    h = torch.tensor([math.log(0.8 / 0.2) / 0.3], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ops.preference_loss(h, 0.3, 0.2).sum(), h)
    assert float(slope) == pytest.approx(0.0, abs=1e-12)
    (slope,) = torch.autograd.grad(ops.preference_loss(h, 0.3).sum(), h)
    assert float(slope) == pytest.approx(-0.3 * 0.2)


def test_ipo_loss_by_hand() -> None:
    """(h - 1 / (2 * 0.25))^2 = (h - 2)^2"""
    h = torch.tensor([2.0, 0.0, -1.0, 5.0])
    assert ops.ipo_loss(h, 0.25).tolist() == [0.0, 4.0, 9.0, 9.0]
