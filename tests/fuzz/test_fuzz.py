"""A few damaged inputs of each kind (tools/fuzz.py runs 1,500), and that a fault is seen at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gipo_megatron import cli
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.problems import Problem
from tools.fuzz import main
from tools.fuzzing.case import Case, Fault, run
from tools.fuzzing.subjects import SUBJECTS, fuzz

pytestmark = pytest.mark.global_rng  # commands seed and draw as in a process of their own

FEW = {"recipes": 40, "models' configurations": 25, "judges' answers": 40, "run folders": 3}


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_fault_in_a_few_inputs(name: str, tmp_path: Path) -> None:
    count = FEW.get(name, 12)
    found = fuzz(name, count, 1, tmp_path / "here")
    assert found.inputs >= count and not found.faults


def test_a_campaign_has_1500_inputs() -> None:
    counts = {name: subject.count for name, subject in SUBJECTS.items()}
    readers = sum(count for name, count in counts.items() if name.startswith("data rows"))
    assert (counts["recipes"], readers, counts["models' configurations"]) == (500, 500, 200)
    assert counts["judges' answers"] == 200 and sum(counts.values()) == 1500


WRONG = {  # what a command does -> the fault that is reported
    "traceback": (lambda: 1 // 0, "traceback: ZeroDivisionError"),
    "code": (lambda: 3, "exit code 3"),
    "lines": (lambda: refuse("a\n" * 60), "more than one screen"),
    "escape": (lambda: print("\x1b[2J") or 0, "a control character"),
    "place": (lambda: refuse("no"), "names none of"),
    "file": (lambda: Path("left").write_text("") or 0, "written"),
    "loop": (lambda: [None for _ in iter(int, 1)] or 0, "hang"),
    "caught": (lambda: swallow(), "hang"),
}


def refuse(what: str) -> int:
    raise UserError(what)


def swallow() -> int:
    try:
        while True:
            pass
    except BaseException as error:
        raise UserError("caught") from error


@pytest.mark.parametrize("name", WRONG)
def test_each_fault_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    action, what = WRONG[name]
    monkeypatch.setattr("tools.fuzzing.case.CPU", 0.2)
    monkeypatch.setattr(cli, "_command", lambda words: action())
    before = dict(os.environ), os.getcwd()
    with pytest.raises(Fault, match=what):
        run(Case(("x",), {"a/b": b""}, ("a.yaml",)), tmp_path / "here")
    assert (dict(os.environ), os.getcwd()) == before


def test_the_command_prints_the_input_of_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Problem, "__str__", lambda problem: "")
    assert main(["--only", "recipes", "--inputs", "5"]) == 1
    printed = capsys.readouterr().out
    assert "names none of" in printed and "Case(('recipe', " in printed
    assert "faults" in printed.splitlines()[-1]
