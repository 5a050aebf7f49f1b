"""Non-finite scores, losses and gradients: the step is skipped and named; a row of them ends the
run with the last good checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.runs import chain


def ppo_with(function: str, directory: Path, base: Path, *more: str) -> list[str]:
    reward = f"algorithm.reward={{name: function, function: tests.runs.rewards:{function}}}"
    return chain.ppo(
        "gipo", directory, base, reward, "run.eval_every=0", "run.save_every=1", "run.keep=9", *more
    )


def alerts(directory: Path) -> list[tuple[int, str]]:
    return [
        (row["step"], row["message"])
        for row in map(json.loads, (directory / "alerts.jsonl").read_text().splitlines())
    ]


@pytest.fixture(scope="module")
def ran(base: Path) -> tuple[Path, list[chain.Outcome]]:
    cases = [
        ppo_with("nan_at_2", base / "nan_once", base, "run.steps=4", "run.loggers=[console]"),
        ppo_with(
            "huge_at_2",
            base / "huge",
            base,
            "run.steps=3",
            "algorithm.reward.normalise=false",
            "algorithm.reward.clip=0",
            # it is in standard deviations of the scores, so huge scores would stay in later rewards
            "algorithm.reward.missing_eos_penalty=0",
        ),
        ppo_with("nan_from_3", base / "nan_on", base, "run.steps=9", "run.max_skipped=2"),
        ppo_with("length", base / "nan_on", base, "run.steps=5"),
        chain.sft(
            base / "exploded",
            "models.actor.lr=1e25",
            "models.actor.warmup_steps=0",
            "run.steps=9",
            "run.save_every=1",
        ),
        chain.sft(
            base / "from_bad", "run.steps=2", f"models.actor.load={base}/nan_on/checkpoints/step_3"
        ),
    ]
    return base, chain.outcomes(cases, base)


@pytest.mark.multiprocess
def test_a_step_with_nan_scores_is_skipped_and_named(ran: tuple[Path, list[chain.Outcome]]) -> None:
    base, done = ran
    assert done[0].error == ""
    rows = chain.rows(base / "nan_once")
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    message = "step 2: no update, scores that are not finite; rows 16, 19"
    assert (2, message) in alerts(base / "nan_once")
    assert f"ALERT {message}" in done[0].printed
    assert rows[1]["reward/non_finite"] == 2 and "policy/loss" not in rows[1]
    assert all(r["policy/loss"] is not None and r["value/loss"] is not None for r in rows[2:])


@pytest.mark.multiprocess
def test_an_overflowing_loss_names_its_role(ran: tuple[Path, list[chain.Outcome]]) -> None:
    base, done = ran
    assert done[1].error == ""
    found = [
        message
        for step, message in alerts(base / "huge")
        if step == 2 and "critic not updated" in message
    ]
    assert len(found) == 1 and re.search(r"rows 16, 17, 18, .* and 8 more$", found[0])
    rows = chain.rows(base / "huge")
    assert [r["step"] for r in rows] == [1, 2, 3] and rows[2]["value/loss"] is not None


@pytest.mark.multiprocess
def test_several_in_a_row_end_the_run(ran: tuple[Path, list[chain.Outcome]]) -> None:
    base, done = ran
    error = done[2].error
    assert error.startswith("2 steps in a row had a number that is not finite (step 5: no update,")
    assert f"{base}/nan_on/checkpoints/step_3" in error
    named = [
        message
        for step, message in alerts(base / "nan_on")
        if step == 3 and "no update, scores" in message
    ]
    assert len(named) == 1  # step 4's went with its row when the run was started again


@pytest.mark.multiprocess
def test_the_last_checkpoint_is_good(ran: tuple[Path, list[chain.Outcome]]) -> None:
    """It resumes with a sound reward, and its weights can be loaded."""
    base, done = ran
    assert (
        done[3].error == ""
        and "resumed from" in done[3].printed
        and (base / "nan_on" / "final").exists()
    )
    rows = chain.rows(base / "nan_on")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5] and rows[4]["policy/loss"] is not None
    assert done[5].error == "" and chain.rows(base / "from_bad")[1]["sft/loss"] is not None


@pytest.mark.multiprocess
def test_weights_that_overflow_end_the_run(ran: tuple[Path, list[chain.Outcome]]) -> None:
    """The first step at an absurd learning rate is sound, all later losses are not."""
    base, done = ran
    assert done[4].error.startswith("3 steps in a row had a number that is not finite")
    named = [
        message for step, message in alerts(base / "exploded") if "actor not updated" in message
    ]
    assert len(named) == 3
    assert not (base / "exploded" / "final").exists()
