"""Whole runs: every layout tells the same story."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs.chain import close, rows

LAYOUTS = ("dp2", "tp2", "tp2_sp", "pp2", "pp2_vpp2", "tp2_mb2_offload")


@pytest.mark.multiprocess
def test_first_steps_agree_with_one_process(base: Path, two: Path) -> None:
    """All metrics of step 1 within 1e-3; the evaluation before it too."""
    alone = rows(base / "gipo")
    compared = 0
    for layout in LAYOUTS:
        there = rows(two / layout)
        assert [r["step"] for r in there] == [0, 1, 2, 3]
        for mine, its in zip(alone[:2], there[:2], strict=True):
            assert mine.keys() == its.keys()
            different = {k: (mine[k], its[k]) for k in mine if not close(mine[k], its[k], 1e-3)}
            assert not different, (layout, different)
            compared += len(mine)
    assert compared > 6 * 60


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["dp2_then_tp2", "tp2_then_pp2"])
def test_resume_at_another_layout(base: Path, two: Path, name: str) -> None:
    alone, resumed = rows(base / "gipo"), rows(two / name)
    assert [r["step"] for r in resumed] == [0, 1, 2, 3]
    different = {
        k: (alone[3][k], resumed[3][k])
        for k in alone[3]
        if not close(alone[3][k], resumed[3][k], 1e-3)
    }
    assert not different


@pytest.mark.multiprocess
def test_ppo_with_kl_on_two_replicas(base: Path, two: Path) -> None:
    alone, there = rows(base / "ppo_kl"), rows(two / "ppo_kl_dp2")
    assert all(close(alone[1][k], there[1][k], 1e-3) for k in alone[1])


def test_run_folder(base: Path) -> None:
    """What design and README promise is in the folder, and nothing half-written."""
    run = base / "gipo"
    for name in (
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "held_out.jsonl",
        "log.txt",
        "report.html",
        "figures",
    ):
        assert (run / name).exists(), name
    assert (run / "final").resolve() == (run / "checkpoints" / "step_3").resolve()
    assert (run / "final" / "tokenizer" / "tokenizer.json").is_file()
    assert not list(run.rglob("*.tmp"))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    trained = [s for s in samples if s["step"] > 0]
    assert len(trained) == 3 * 16
    assert {"prompt", "response", "score", "p_high", "weight", "kl"} <= trained[0].keys()
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]


def test_keep_last_checkpoints(base: Path) -> None:
    run = base / "gipo_long"
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert {"step_4", "step_5"} <= kept
    linked = {(run / name).resolve().name for name in ("final", "best")}
    assert kept == {"step_4", "step_5"} | linked


def test_gipo_starts_where_ppo_does(base: Path) -> None:
    """Same rollout, same labels before anything is trained: the first step differs in weights and
    prices alone."""
    ppo, gipo = rows(base / "ppo_kl")[1], rows(base / "gipo")[1]
    same = [
        k
        for k in ppo
        if k.startswith(("rollout/", "reward/", "source/", "groups/score", "groups/return"))
    ]
    assert len(same) > 15
    assert {k: ppo[k] for k in same} == {k: gipo[k] for k in same}
