from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.problems import SHOWN, Problem, RecipeErrors, fail, suggest


def test_suggest_names_the_nearest_or_all() -> None:
    assert suggest("vriance", ["variance", "input"]) == "did you mean 'variance'?"
    assert suggest("zzz", ["b", "a"]) == "known here: a, b"
    assert suggest("zzz", []) == ""
    assert suggest("0", [f"name{i}" for i in range(SHOWN + 3)]).endswith("and 3 more")


def test_all_problems_on_one_screen() -> None:
    text = str(
        RecipeErrors("x", [Problem(f"k{i}", "bad", "f:1", "mend") for i in range(SHOWN + 5)])
    )
    assert text.startswith(f"x: {SHOWN + 5} problems\nk0: bad\n  where: f:1\n  fix:   mend\n")
    assert text.endswith("and 5 more")
    assert len(text.splitlines()) <= 60


def test_rank_0_prints_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as left:
        fail(UserError("what", where="here", fix="so"))
    assert left.value.code == 2
    assert capsys.readouterr().err == "what\n  where: here\n  fix:   so\n"


def test_other_ranks_are_silent_wait_and_exit_with_2_even_when_torchrun_ends_them() -> None:
    code = (
        "from gipo_megatron.recipe.problems import fail; from gipo_megatron.errors import"
        " UserError; import threading, os, signal; threading.Timer(0.2, lambda:"
        " os.kill(os.getpid(), signal.SIGTERM)).start(); fail(UserError('what'), patience=600)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RANK": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
