"""Whole DPO runs: the reference asked once or all the time, resumed, and at other layouts, tells
one story."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data.fixtures import needs_shared_data
from tests.runs.chain import close, rows


def same(a: Path, b: Path, steps: tuple[int, ...], tolerance: float) -> int:
    """All metrics of these steps are close; returns how many were compared.

    Until the first update the actor is its reference: each margin is 0 or the last bit of rounding,
    and its sign, the accuracy, is noise.
    """
    mine, its = ({row["step"]: row for row in rows(directory)} for directory in (a, b))
    compared = 0
    for step in steps:
        assert mine[step].keys() == its[step].keys()
        names = [name for name in mine[step] if step > 1 or "accuracy" not in name]
        different = {
            k: (mine[step][k], its[step][k])
            for k in names
            if not close(mine[step][k], its[step][k], tolerance)
        }
        assert not different, (step, different)
        compared += len(names)
    return compared


def test_a_run(base: Path) -> None:
    story = rows(base / "dpo")
    assert [row["step"] for row in story] == [0, 1, 2, 3, 4]
    assert story[0].keys() == {"step", *(f"eval/{name}" for name in EVALUATED)}
    assert story[1].keys() == {"step", *(f"dpo/{name}" for name in TRAINED)}
    assert story[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5), (
        "the actor is its reference: log 2"
    )
    assert story[4]["eval/loss"] != story[0]["eval/loss"] and story[4]["eval/pairs"] == 8
    assert (base / "dpo" / "final").resolve().name == "step_4"


TRAINED = (
    "loss",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "grad_norm",
    "learning_rate",
)
EVALUATED = (
    "loss",
    "accuracy",
    "margin",
    "pairs",
    "accuracy/easy",
    "accuracy/hard",
    "accuracy_low",
    "accuracy_high",
)


@pytest.mark.parametrize("name", ["dpo_live", "dpo_swapped"])
def test_a_live_reference_says_the_same(base: Path, name: str) -> None:
    assert same(base / name, base / "dpo", (0, 1, 2, 3, 4), 1e-4) > 35


def test_a_resumed_run_is_the_same_bit_for_bit(base: Path) -> None:
    assert same(base / "dpo_resumed", base / "dpo", (3, 4), 0.0) > 20


def test_more_steps_ask_about_more_rows(base: Path) -> None:
    """With the actor trained by then: the rest of the run is that of one which asked about all of
    them at its beginning."""
    assert same(base / "dpo_longer", base / "dpo", (3, 4), 1e-4) > 20
    tables = [_table(base / "dpo_longer" / "checkpoints" / f"step_{step}") for step in (2, 4)]
    assert [len(table["rows"]) for table in tables] == [16, 32]
    assert torch.equal(tables[1]["sums"][:16], tables[0]["sums"])


def _table(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint / "state.pt", weights_only=True)["algorithm"]["reference"][
        "splits"
    ]["train"]


@pytest.mark.multiprocess
def test_two_processes(base: Path, two: Path) -> None:
    for layout in ("dpo_dp2", "dpo_tp2"):
        assert same(two / layout, base / "dpo", (0, 1, 2), 1e-3) > 20, layout
    assert same(two / "dpo_pp2", base / "dpo", (3,), 1e-3) > 5, "resumed at another layout"


@needs_shared_data
@pytest.mark.multiprocess
def test_real_pairs_on_two_processes(two: Path) -> None:
    """recipe=tiny/dpo data.path=…/hh-rlhf: no other key about the data."""
    story = rows(two / "dpo_hh")
    assert [row["step"] for row in story] == [0, 1, 2]
    assert (
        story[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5)
        and story[2]["dpo/margin"] is not None
    )
    assert {"eval/accuracy/harmless-base", "eval/accuracy/helpful-base"} <= story[2].keys()
