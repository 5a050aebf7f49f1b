"""Rows and metrics: selecting, counting, reducing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest
import torch
from torch import Tensor

from gipo_megatron.metrics import Metric, merge_metrics, prefixed
from gipo_megatron.types import Groups, Pairs, Sequences
from tests.small_ppo import rollout_of


def sequences(rows: int, offset: int = 0) -> Sequences:
    lengths = 2 + torch.arange(rows) % 3
    return Sequences(
        tokens=offset + torch.arange(rows * 4).reshape(rows, 4),
        mask=(torch.arange(4) >= 1) & (torch.arange(4) < lengths[:, None]),
        prompt_lengths=torch.ones(rows, dtype=torch.int64),
        lengths=lengths,
        ids=offset + torch.arange(rows),
    )


def pairs(rows: int) -> Pairs:
    return Pairs(sequences(rows), sequences(rows, 100), tuple(f"s{i}" for i in range(rows)))


def test_select_and_block_reach_every_field() -> None:
    whole = pairs(5)
    picked = whole.select(torch.tensor([3, 0]))
    assert picked.source == ("s3", "s0")
    assert picked.chosen.ids.tolist() == [3, 0]
    assert picked.rejected.tokens[:, 0].tolist() == [112, 100]
    block = whole.block(1, 3)
    assert (len(block), block.source, block.rejected.ids.tolist()) == (2, ("s1", "s2"), [101, 102])
    assert len(whole) == 5
    assert len(whole.block(4, 9)) == 1


def test_a_pair_is_two_sequences_chosen_first() -> None:
    both = pairs(3).sequences
    assert both.ids.tolist() == [0, 1, 2, 100, 101, 102]
    assert pairs(3).row_ids.tolist() == [0, 1, 2]


def test_counts() -> None:
    assert sequences(4).lengths.tolist() == [2, 3, 4, 2]
    assert sequences(4).counts() == {"token": 1 + 2 + 3 + 1, "sequence": 4, "pair": 4}
    assert pairs(4).counts() == {"token": 14, "sequence": 8, "pair": 4}


def test_rollout_lengths() -> None:
    rollout = rollout_of(["a", "b"])
    assert rollout.response_lengths.tolist() == [2, 2]
    assert rollout.sequences.lengths.tolist() == [3, 3]
    assert rollout.select(torch.tensor([1])).source == ("b",)
    assert rollout.block(0, 1).generation_logprobs is None


def test_gap_is_to_the_lowest_other_group() -> None:
    returns = torch.tensor([0.5, 2.0, -1.0])
    groups = Groups(
        torch.ones(1, 3),
        torch.ones(1),
        torch.ones(1),
        returns,
        torch.tensor([1.0, 2.0, 1.0]),
        torch.tensor(0.0),
        4,
        1,
        1.0,
    )
    assert float(groups.gap) == 3.0
    assert groups.shares.tolist() == [0.25, 0.5, 0.25]


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, generator=generator) + 5
    return x, 0.5 * x + torch.randn(24, generator=generator), torch.rand(24, generator=generator)


KINDS: dict[
    str,
    tuple[
        Callable[[Tensor, Tensor, Tensor], Metric],
        Callable[[np.ndarray, np.ndarray, np.ndarray], float],
    ],
] = {
    "sum": (lambda x, y, w: Metric.sum(x), lambda x, y, w: x.sum()),
    "mean": (lambda x, y, w: Metric.mean(x), lambda x, y, w: x.mean()),
    "weighted": (lambda x, y, w: Metric.mean(x, w), lambda x, y, w: np.average(x, weights=w)),
    "std": (lambda x, y, w: Metric.std(x), lambda x, y, w: x.std()),
    "correlation": (
        lambda x, y, w: Metric.correlation(x, y),
        lambda x, y, w: np.corrcoef(x, y)[0, 1],
    ),
    "explained": (
        lambda x, y, w: Metric.explained_variance(x, y),
        lambda x, y, w: 1 - (x - y).var() / x.var(),
    ),
    "min": (lambda x, y, w: Metric.min(x), lambda x, y, w: x.min()),
    "max": (lambda x, y, w: Metric.max(x), lambda x, y, w: x.max()),
}


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [5, 0, 19], [8, 8, 8]])
@pytest.mark.parametrize("kind", list(KINDS))
def test_metrics_are_numpys_however_the_rows_are_split(kind: str, sizes: list[int]) -> None:
    make, exact = KINDS[kind]
    x, y, w = data()
    pieces = [
        make(*p)
        for p in zip(x.split(sizes), y.split(sizes), w.split(sizes), strict=True)
        if len(p[0]) or kind not in ("min", "max")
    ]
    assert len(pieces) >= 1
    merged = reduce(Metric.merge, pieces)
    assert merged.result() == pytest.approx(
        exact(x.double().numpy(), y.double().numpy(), w.double().numpy()), rel=1e-9
    )


def test_what_is_not_defined_is_nan() -> None:
    nothing, constant, x = torch.zeros(0), torch.full((4,), 0.1), torch.arange(4.0)
    undefined = [
        Metric.mean(nothing),
        Metric.mean(x, torch.zeros(4)),
        Metric.std(nothing),
        Metric.correlation(constant, x),
        Metric.correlation(x, constant),
        Metric.explained_variance(constant, x),
    ]
    assert all(math.isnan(m.result()) for m in undefined)
    assert Metric.std(constant).result() == pytest.approx(0.0, abs=1e-7)


def test_rows_of_weight_zero_may_hold_anything() -> None:
    assert Metric.mean(torch.tensor([1.0, math.nan]), torch.tensor([2.0, 0.0])).result() == 1.0


def test_names_merge_and_get_prefixes() -> None:
    both = merge_metrics(
        {"a": Metric.sum(1.0), "b": Metric.sum(5.0)}, {"a": Metric.sum(2.0), "c": Metric.sum(7.0)}
    )
    assert {name: m.result() for name, m in both.items()} == {"a": 3.0, "b": 5.0, "c": 7.0}
    assert prefixed("policy", {"loss": both["a"], "groups/x_0": both["b"]}).keys() == {
        "policy/loss",
        "groups/x_0",
    }
    with pytest.raises(AssertionError, match="sum merged with mean"):
        Metric.sum(1.0).merge(Metric.mean(1.0))
