"""A run that is continued on other rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.training import runner
from gipo_megatron.training.runner import Progress, Run


def resumed(monkeypatch: pytest.MonkeyPatch, **saved: Any) -> Run:
    """Return a run on the rows "a", held out "b", that has continued one on `saved`."""
    before = Progress(step=3, best=0.5, best_step=2, judged_by="eval/score", **saved)
    state = {"progress": before.state_dict(), "algorithm": {}, "alerts": {}}
    monkeypatch.setattr(runner.checkpoint, "restore", lambda *_: state)
    monkeypatch.setattr(runner, "check_tokenizer", lambda *_, **__: [])
    parts = SimpleNamespace(
        train=SimpleNamespace(fingerprint="a"),
        held_out=SimpleNamespace(fingerprint="b"),
        notes=[],
        tokenizer=None,
        trained={},
        algorithm=None,
    )
    alerts = SimpleNamespace(load_state_dict=lambda state: None)
    recipe = SimpleNamespace(data=SimpleNamespace(template=""), alerts=alerts)
    anything: Any = None
    run = Run(recipe, anything, parts, [], anything, anything, Path("run"))  # type: ignore[arg-type]
    run._resume(Path("step_3"))
    return run


def test_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resumed(monkeypatch, data="a", held_out_data="b")
    assert (run.progress.best, run.progress.best_step, run.parts.notes) == (0.5, 2, [])


def test_other_training_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the training data differ from those of step_3") as error:
        resumed(monkeypatch, data="other", held_out_data="b")
    assert error.value.where == "data"


def test_other_held_out_rows_are_named_and_best_begins_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their figures cannot be compared with those of the rows before."""
    run = resumed(monkeypatch, data="a", held_out_data="other")
    assert (run.progress.best, run.progress.held_out_data) == (None, "b")
    assert run.parts.notes == ["other held-out rows than at step_3: `best` begins again"]
