"""Shared statistics against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr

from gipo_megatron.statistics import correlation, wilson_interval


def test_wilson_interval() -> None:
    checked = 0
    for right, count in ((0, 5), (33, 60), (7, 7), (812, 1000)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        found = wilson_interval(right / count, count)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-8)
        checked += 1
    assert checked == 4


def test_correlation() -> None:
    x, y = np.random.Generator(np.random.PCG64(0)).normal(size=(2, 50))
    assert correlation(x, x + y) == pytest.approx(pearsonr(x, x + y).statistic)
    assert correlation(x, -x) == pytest.approx(-1.0)
    assert correlation(x[:2], y[:2]) is None and correlation(x, np.full(50, 0.1)) is None
