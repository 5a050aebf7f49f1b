from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kurtosis, skew

from gipo_megatron.reports.distributions import tails
from gipo_megatron.reports.figures import draw
from gipo_megatron.reports.runs import load_run
from tests.reports.synthetic import ppo_run, write_rows


def test_points_and_bars_are_the_samples(tmp_path: Path) -> None:
    run = load_run(ppo_run(tmp_path / "gipo", steps=15))
    figures = draw([run])
    points = sum(len(c.get_offsets()) for c in figures.drawn["p_high"].axes[0].collections)
    assert points == 3 * 16  # the last fifth of 15 steps
    bars = [
        sum(p.get_height() for p in c)
        for c in figures.drawn["reward_distribution"].axes[0].containers
    ]
    assert bars == pytest.approx([1.0, 1.0])  # outliers are counted, nothing is lost
    end = [row for row in run.samples if row["step"] > 12]
    r = np.corrcoef([row["score"] for row in end], [row["p_high"] for row in end])[0, 1]
    assert (
        figures.drawn["p_high"].axes[0].get_title(loc="left")
        == f"p(high group) against score, r = {r:+.2f}"
    )
    means = [line.get_xdata()[0] for line in figures.drawn["reward_distribution"].axes[0].lines]
    assert means[1] == pytest.approx(np.mean([row["score"] for row in end]))
    notes = [text.get_text() for text in figures.drawn["reward_distribution"].axes[0].texts]
    assert notes[1] == f"end: {tails([row['score'] for row in end])}" and notes[0].startswith(
        "start: skew "
    )


def test_labels_that_never_vary_and_samples_without_scores(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1}])
    rows = [{"step": 1, "p_high": 0.5, "score": float(i), "length": 3} for i in range(4)]
    write_rows(tmp_path / "samples.jsonl", rows)
    figures = draw([load_run(tmp_path)])
    assert "p_high" in figures.missing and "reward_distribution" in figures.drawn
    write_rows(
        tmp_path / "samples.jsonl",
        [{**row, "score": 1.0, "p_high": row["score"] / 4} for row in rows],
    )
    assert "r undefined" in draw([load_run(tmp_path)]).drawn["p_high"].axes[0].get_title(loc="left")


def test_tails_by_hand_and_as_scipy() -> None:
    scores = np.random.Generator(np.random.PCG64(0)).exponential(size=237) ** 2 - 3
    found = tails(scores)
    assert found.skew == pytest.approx(skew(scores)) and found.kurtosis == pytest.approx(
        kurtosis(scores)
    )
    assert (found.mean, found.std, found.count) == (
        pytest.approx(scores.mean()),
        pytest.approx(scores.std()),
        237,
    )
    assert found.cvar == pytest.approx(
        (np.sort(scores)[:23].sum() + 0.7 * np.sort(scores)[23]) / 23.7
    )
    two = tails([0.0, 0.0, 0.0, 4.0])  # mean 1, m2 = 3, m3 = 6, m4 = 21
    assert (two.skew, two.kurtosis) == (pytest.approx(6 / 3**1.5), pytest.approx(21 / 9 - 3))
    assert two.cvar == 0.0 and tails(list(range(20, 0, -1))).cvar == 1.5
    assert str(two) == "skew +1.15, kurt -0.67, CVaR₁₀ +0.00"
    same = tails([2.0, 2.0])
    assert (same.skew, same.kurtosis, same.cvar) == (None, None, 2.0) and str(
        same
    ) == "skew –, kurt –, CVaR₁₀ +2.00"
    with pytest.raises(ValueError, match="no scores"):
        tails([])
