"""Intervals and tests of paired differences, one number per seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap, permutation_test

RESAMPLES = 9999


def interval(x: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of x [n]."""
    if np.ptp(x) == 0:
        return float(x[0]), float(x[0])
    found = bootstrap(
        (x,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def sign_flip(x: np.ndarray) -> float:
    """Return the one-sided p-value of "the mean of x [n] is not above 0": the share of the sign
    patterns, all of them up to n = 13, whose mean is at least as large."""
    return float(
        permutation_test(
            (x,),
            lambda a, axis: np.mean(a, axis=axis),
            permutation_type="samples",
            alternative="greater",
            n_resamples=RESAMPLES,
            vectorized=True,
            random_state=np.random.default_rng(0),
        ).pvalue
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for all comparisons together (Holm 1979).

    Of m sorted p-values the k-th (from 0) becomes max(that before it, (m - k) p_k), at most 1.
    """
    adjusted, last = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        last = max(last, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = last
    return adjusted
