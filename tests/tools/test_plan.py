"""The two commands that print a plan: tools/plan.py, and launch/train.py with dry_run=true."""

from __future__ import annotations

from pathlib import Path

import pytest

from gipo_megatron.commands import train
from gipo_megatron.errors import UserError
from tests import forked
from tests.forked import ROOT


def test_a_dry_run_is_the_plan_and_needs_no_weights(tmp_path: Path) -> None:
    words = ("recipe=hh_gipo", "world=16", "batch.micro_tokens=4096")
    one, other = (
        forked.run(ROOT / "tools" / "plan.py", *words, folder=tmp_path),
        forked.run(ROOT / "launch" / "train.py", *words, "dry_run=true", folder=tmp_path),
    )
    assert (one.code, one.stderr) == (other.code, other.stderr) == (0, "")
    assert one.stdout == other.stdout
    assert one.stdout.startswith(
        "hh_gipo: ppo on 16 ranks = tensor 4 × pipeline 1 × data 4; 2 nodes of 8 ranks, in order\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_world_that_does_not_factor_is_one_screen_and_exit_code_2(tmp_path: Path) -> None:
    done = forked.run(ROOT / "tools" / "plan.py", "recipe=hh_gipo", "world=18", folder=tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert (
        "tensor 4 × pipeline 1 × data ? ≠ world 18" in done.stderr
        and "fix:   start a multiple of 4 processes" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_other_ranks_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert train.main(["recipe=hh_gipo", "dry_run=true"]) == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_is_no_recipe_key() -> None:
    assert train.split_dry_run(["recipe=a", "dry_run=true", "b=c"]) == (["recipe=a", "b=c"], True)
    assert train.split_dry_run(["recipe=a", "dry_run=false"]) == (["recipe=a"], False)
    with pytest.raises(UserError, match="dry_run is true or false"):
        train.split_dry_run(["dry_run=maybe"])
