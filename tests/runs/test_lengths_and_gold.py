"""Runs whose length is given in epochs, and one whose held-out responses a gold model scores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.runs import chain

pytestmark = pytest.mark.multiprocess
# 40 planted prompts, of which 32 are trained on, a response each
PASSES = ["run.steps=null", "data.planted.pairs_per_prompt=1", "run.save_every=2"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[chain.Outcome]]:
    base = tmp_path_factory.mktemp("lengths")
    gold = [f"models.gold.load={base}/gold/final", "run.steps=4", "run.eval_every=1"]
    cases = [
        chain.sft(base / "sft", *PASSES, "run.epochs=1"),
        chain.sft(base / "sft", *PASSES, "run.epochs=2"),
        chain.sft(base / "sft", *PASSES, "run.epochs=2"),
        chain.sft(
            base / "branch", *PASSES, "run.epochs=2", f"run.resume={base}/sft/checkpoints/step_6"
        ),
        chain.reward_model(base / "rm", base / "sft", "data.part=1/2"),
        chain.reward_model(base / "gold", base / "sft", "data.part=2/2", "run.seed=1"),
        chain.ppo("gipo", base / "gipo", base, *gold, "run.save_every=1", "+report"),
    ]
    return base, chain.outcomes(cases, base)


def test_epochs_are_the_same_steps_at_every_start(done: tuple[Path, list[chain.Outcome]]) -> None:
    """32 rows in batches of 8: 4 steps a pass. A second pass goes on, and a complete run is left
    alone."""
    base, outcomes = done
    first, second, again, branch = (one.printed for one in outcomes[:4])
    assert not any(one.error for one in outcomes)
    assert "  4 steps × 8 rows = 1.00 epochs of 32\n" in first
    assert "complete at step 4 of 4" in first
    assert f"resumed from {base}/sft/checkpoints/step_4" in second
    assert "  8 steps × 8 rows = 2.00 epochs of 32\n" in second
    assert "complete at step 8 of 8" in second and "complete at step 8 of 8" in branch
    assert again == (
        f"tiny/sft: complete already, {base}/sft/checkpoints/step_8; a larger run.epochs"
        " continues it\n"
    )


def test_the_best_checkpoint_is_the_golds(done: tuple[Path, list[chain.Outcome]]) -> None:
    """Of the steps that were trained; the run's last lines and its report show peak and loss."""
    base, outcomes = done
    rows = chain.rows(base / "gipo")
    gold = {int(row["step"] or 0): row["eval/gold"] for row in rows}
    assert list(gold) == [0, 1, 2, 3, 4] and None not in gold.values()
    trained = {step: value for step, value in gold.items() if step}
    best = max(trained, key=lambda step: trained[step] or 0.0)
    assert os.readlink(base / "gipo" / "best").endswith(f"step_{best}")
    lines = [line for line in outcomes[-1].printed.splitlines() if "held-out gold" in line]
    assert len(lines) == 1 and lines[0].startswith("tiny/gipo: held-out gold: peak ")
    assert lines[0].removeprefix("tiny/gipo: held-out gold: ") in (
        base / "gipo" / "report.html"
    ).read_text(encoding="utf-8")
