from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gipo_megatron.telemetry.figures import draw
from gipo_megatron.telemetry.runs import load_run
from tests.telemetry.synthetic import ppo_run, write_rows


def test_points_and_bars_are_the_samples(tmp_path: Path) -> None:
    run = load_run(ppo_run(tmp_path / "gipo", steps=15))
    figures = draw([run])
    points = sum(len(c.get_offsets()) for c in figures.drawn["p_high"].axes[0].collections)
    assert points == 3 * 16  # the last fifth of 15 steps
    bars = [sum(p.get_height() for p in c) for c in figures.drawn["reward_distribution"].axes[0].containers]
    assert bars == pytest.approx([1.0, 1.0])  # outliers are counted, nothing is lost
    end = [row for row in run.samples if row["step"] > 12]
    r = np.corrcoef([row["score"] for row in end], [row["p_high"] for row in end])[0, 1]
    assert figures.drawn["p_high"].axes[0].get_title(loc="left") == f"p(high group) against score, r = {r:+.2f}"
    means = [line.get_xdata()[0] for line in figures.drawn["reward_distribution"].axes[0].lines]
    assert means[1] == pytest.approx(np.mean([row["score"] for row in end]))


def test_labels_that_never_vary_and_samples_without_scores(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1}])
    rows = [{"step": 1, "p_high": 0.5, "score": float(i), "length": 3} for i in range(4)]
    write_rows(tmp_path / "samples.jsonl", rows)
    figures = draw([load_run(tmp_path)])
    assert "p_high" in figures.missing and "reward_distribution" in figures.drawn
    write_rows(tmp_path / "samples.jsonl", [{**row, "score": 1.0, "p_high": row["score"] / 4} for row in rows])
    assert "r undefined" in draw([load_run(tmp_path)]).drawn["p_high"].axes[0].get_title(loc="left")
