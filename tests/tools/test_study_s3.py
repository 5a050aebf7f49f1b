"""tools/study.py s3: curves and outcomes by hand, what is left to run, and runs of the trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.files import write_jsonl
from tools import study
from tools.studies import s3, s3_report
from tools.studies.chains import Job, run_all
from tools.studies.compare import findings
from tools.studies.curves import Cell, curve_of, outcomes
from tools.studies.options import Options

LAST = {"eval/gold": 0.4, "eval/gold/easy": 0.6, "eval/gold/hard": 0.2, "eval/score": 1.5}


def test_a_curve_is_read_from_a_run(tmp_path: Path) -> None:
    """Evaluations at 0 and 4. Row i has responses of the policy after i - 1 updates: within two of
    0 are rows 1, 2 and 3, within two of 4 row 3 and those after it."""
    rows = [{"step": 0, **LAST, "eval/kl": 0.0}]
    rows += [{"step": i, "kl/mean": float(i)} for i in range(1, 5)]
    labels = {"source/easy/p_high": 0.9, "source/hard/p_high": 0.3}
    rows[4] |= LAST | labels | {"eval/kl": 3.0, "eval/gold/hard": -0.2}
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    texts = [(3, "what?"), (4, "huh?"), (4, "ant"), (4, "egg"), (4, "which?")]
    samples = [{"step": step, "response": text} for step, text in texts]
    write_jsonl(tmp_path / "samples.jsonl", samples)
    assert curve_of(tmp_path, every=4) == {
        "step": [0, 4],
        "easy": [0.6, 0.6],
        "hard": [0.2, -0.2],
        "proxy": [1.5, 1.5],
        "kl": [2.0, 3.5],
        "eval_kl": [0.0, 3.0],
        "questions": [None, 0.5],
        "label": [None, pytest.approx(0.8)],
    }


def curve(easy: Sequence[float], hard: Sequence[float], kl: float) -> dict[str, list[float | None]]:
    """Return a curve with these golds."""
    zeros: list[float | None] = [0.0] * len(easy)
    named = dict.fromkeys(("step", "proxy", "eval_kl", "questions"), zeros)
    label = [None, *zeros[1:]]
    return {**named, "easy": [*easy], "hard": [*hard], "kl": [kl] * len(easy), "label": label}


def test_outcomes_by_hand() -> None:
    """The mean gold is 0, 0.5, 0.7, 0.6, 0.2: of three in a row 0.4, 0.6 and 0.5."""
    found = outcomes(curve([0, 0.4, 0.8, 0.9, 0.4], [0, 0.6, 0.6, 0.3, 0.0], 2.0))
    assert found["easy"] == pytest.approx(0.7)
    assert found["hard"] == found["worse"] == pytest.approx(0.3)
    assert found["mean"] == pytest.approx(0.5)
    assert found["gap"] == pytest.approx(0.4)
    assert found["peak"] == pytest.approx(0.6)
    assert found["decline"] == pytest.approx(0.1)
    assert (found["kl"], found["label"]) == (2.0, 0.0)


# ----------------------------------------------------------------------------------- the comparison

# η of PPO with KL -> its KL; gold of both sources is kl / 10 + seed / 100
CURVE = {0.0: 5.0, 0.1: 4.0, 0.2: 3.0, 0.35: 2.0, 0.6: 1.0}
GAINS = {"gipo_head": 0.03, "gipo_value": 0.05, "adaptive": -0.01, "oracle": 0.1}


def synthetic(seeds: int, steps: int) -> list[Cell]:
    """Return all cells; each system gains as in GAINS, at a KL of 2.5."""
    cells = []
    for cell in [cell for seed in range(seeds) for cell in s3.cells_of(seed, steps)]:
        kl = CURVE[cell.eta] if cell.system == "ppo_kl" else 2.5
        gold = kl / 10 + cell.seed / 100 + GAINS.get(cell.system, 0.0)
        cells.append(Cell(**asdict(cell) | {"curve": curve([gold] * 3, [gold] * 3, kl)}))
    return cells


def test_verdicts_and_the_default() -> None:
    """Each of ten seeds gains, so p is 1/1024, and 3/1024 after Holm; `adaptive` loses a little."""
    world = s3_report.as_world(synthetic(10, 80))
    found = {f.system: f for f in findings([world], s3_report.RULE)}
    head, value, adaptive = (found[x] for x in ("gipo_head", "gipo_value", "adaptive"))
    assert head.worse is not None and head.worse.values == pytest.approx([0.03] * 10)
    assert value.mean is not None and value.mean.values == pytest.approx([0.05] * 10)
    assert head.verdict == value.verdict == "shown"
    assert head.p == value.p == pytest.approx(3 / 1024)
    assert "lower bound is not above 0" in adaptive.verdict
    better = s3_report.value_against_head(world)
    assert better is not None and better.values == pytest.approx([0.02] * 10)
    assert s3_report.default_classifier(world) == "gipo_value"


def test_the_learned_head_stays_where_the_value_split_is_not_better() -> None:
    cells = [cell for cell in synthetic(5, 80) if cell.system != "gipo_value"]
    assert s3_report.default_classifier(s3_report.as_world(cells)) == "gipo_head"
    swapped = {"gipo_head": "gipo_value", "gipo_value": "gipo_head"}
    cells = [
        Cell(**asdict(cell) | {"system": swapped.get(cell.system, cell.system)})
        for cell in synthetic(5, 80)
    ]
    assert s3_report.default_classifier(s3_report.as_world(cells)) == "gipo_head"


def test_a_comparison_needs_both_the_worse_source_and_the_mean() -> None:
    up, down = np.array([0.1, 0.2, 0.3]), np.array([-0.1, -0.2, -0.3])
    assert s3_report.RULE.p_value(up, up) == 1 / 8
    assert s3_report.RULE.p_value(up, down) == s3_report.RULE.p_value(down, up) == 1.0
    assert s3_report.RULE.p_value(up, np.full(3, -0.01)) == 1 / 8


def test_tables_of_the_whole_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = synthetic(3, 80)[:-1]
    write_jsonl(tmp_path / "cells.jsonl", map(asdict, cells))
    study.main(["s3", "train=false", f"out={tmp_path}"])
    page = (tmp_path / "s3_tables.md").read_text(encoding="utf-8")
    number = len(s3.cells_of(0, 80))
    assert f"2 seeds × 80 iterations, {2 * number} cells" in page
    assert "+0.050 [+0.050, +0.050]" in page
    assert (tmp_path / "s3.svg").stat().st_size > 10_000
    assert len((tmp_path / "s3.csv").read_text(encoding="utf-8").splitlines()) == 2 * number + 1
    assert "default by the rule: GIPO, value split" in capsys.readouterr().out
    with pytest.raises(UserError, match="0 seeds have all their cells"):
        study.main(["s3", "train=false", "steps=90", f"out={tmp_path}"])


# ----------------------------------------------------------------------------------------- the runs


def test_runs_that_are_left_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed by seed; seed 0 has all its cells, seed 1 its SFT run."""
    left: list[Job] = []

    def record(jobs: Sequence[Job], workers: int, ended: Callable[[Job], None]) -> list[Job]:
        left.extend(jobs)
        return []

    monkeypatch.setattr(s3, "run_all", record)
    options = Options(2, 80, tmp_path, tmp_path)
    cells = [f"{name}_{eta:g}" for name, system in s3.SYSTEMS.items() for eta in system.etas]
    s3.train(options)
    stages = ["sft", "rm", *cells]
    assert [job.name for job in left] == [f"seed {n} {name}" for n in (0, 1) for name in stages]
    assert not left[1].ready and not left[2].ready

    write_jsonl(tmp_path / "cells.jsonl", map(asdict, synthetic(1, 80)))
    (tmp_path / "seed1/sft/final").mkdir(parents=True)
    left.clear()
    s3.train(options)
    assert [job.name for job in left] == [f"seed 1 {name}" for name in stages[1:]]
    assert left[0].ready and not left[1].ready


def test_a_failed_run_holds_back_what_needs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Job("bad", tmp_path / "bad", ("recipe=no_such_recipe",))
    after = Job("after", tmp_path / "after", ("recipe=tiny/rm",), (bad.folder,))
    ended: list[Job] = []
    assert run_all([after, bad], 2, ended.append) == [bad, after]
    assert not ended and not after.folder.exists()
    assert "bad: exit code 2" in capsys.readouterr().err
    assert "no_such_recipe" in (tmp_path / "bad.log").read_text(encoding="utf-8")


def test_one_cell_with_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ("run.steps=1", "run.eval_every=0")
    monkeypatch.setattr(s3, "SFT", (*s3.SFT, *short, "models.actor.schedule=constant"))
    monkeypatch.setattr(s3, "RM", (*s3.RM, *short, "models.reward.schedule=constant"))
    one = replace(s3.SYSTEMS["gipo_value"], etas=(0.2,))
    monkeypatch.setattr(s3, "SYSTEMS", {"gipo_value": one})
    s3.train(Options(1, 2, tmp_path, tmp_path))
    (row,) = map(json.loads, (tmp_path / "cells.jsonl").read_text(encoding="utf-8").splitlines())
    cell = Cell(**row)
    assert (cell.seed, cell.system, cell.curve["step"]) == (0, "gipo_value", [0, 2])
    assert {len(numbers) for numbers in cell.curve.values()} == {2}
    assert [x.name for x in (tmp_path / "seed0/gipo_value_0.2").iterdir()] == ["metrics.jsonl"]

    def nothing(jobs: Sequence[Job], workers: int, ended: Callable[[Job], None]) -> list[Job]:
        assert not jobs
        return []

    monkeypatch.setattr(s3, "run_all", nothing)
    s3.train(Options(1, 2, tmp_path, tmp_path))
