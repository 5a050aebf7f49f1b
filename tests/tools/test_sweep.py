from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gipo_megatron.commands import RECIPES
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.compose import load_components
from gipo_megatron.recipe.source import Block
from tests import forked
from tools import sweep

# here, since a package that the components import may draw from a global generator
load_components(Block({}, "tests"))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0..4", ("0", "1", "2", "3", "4")),
        ("-1..1", ("-1", "0", "1")),
        ("3..3", ("3",)),
        ("4..0", ()),
        ("a,b,c", ("a", "b", "c")),
        ("[a,b],[c]", ("[a,b]", "[c]")),
        ("{x: 1, y: 2}", ("{x: 1, y: 2}",)),
        ("'a,b',c", ("'a,b'", "c")),
        ("1e-3", ("1e-3",)),
        ("", ("",)),
    ],
)
def test_values(text: str, values: tuple[str, ...]) -> None:
    assert sweep.values_of(text) == values


def test_the_last_key_changes_fastest_and_fragments_are_not_varied() -> None:
    plan = sweep.parse(
        [
            "recipe=tiny/gipo",
            "with=a,b",
            "run.seed=0..1",
            "run.steps=3",
            "data.template=x,y",
            "nproc=2",
            "dry=true",
        ]
    )
    assert plan.fixed == ("recipe=tiny/gipo", "with=a,b", "run.steps=3")
    assert (plan.nproc, plan.dry) == (2, True)
    assert plan.points == [
        ("run.seed=0", "data.template=x"),
        ("run.seed=0", "data.template=y"),
        ("run.seed=1", "data.template=x"),
        ("run.seed=1", "data.template=y"),
    ]


@pytest.mark.parametrize("word", ["nproc=many", "nproc=0", "dry=yes", "run.seed=4..0"])
def test_unreadable_words(word: str) -> None:
    with pytest.raises(UserError):
        sweep.parse(["recipe=tiny/gipo", word])


def test_every_combination_has_its_own_run_folder() -> None:
    words = [
        "recipe=tiny/gipo",
        "run.seed=0..2",
        "algorithm.kl_controller.eta=0.05,0.1",
        "data.planted.seed=1,2",
        "run.loggers=[console],[]",
    ]
    plan = sweep.parse(words)
    commands = [sweep.command(plan, point, RECIPES) for point in plan.points]
    folders = [command[-1] for command in commands]
    assert len(set(folders)) == len(folders) == 3 * 2 * 2 * 2
    assert (
        folders[0]
        == "run.dir=runs/tiny_gipo/run.seed=0,eta=0.05,data.planted.seed=1,loggers=_console_"
    )
    assert commands[0][:2] == [sys.executable, str(sweep.TRAIN)]
    single = sweep.parse(["recipe=tiny/gipo", "run.seed=3"])
    assert sweep.command(single, (), RECIPES)[2:] == ["recipe=tiny/gipo", "run.seed=3"]


def test_torchrun_starts_several_processes_and_the_check_knows_how_many() -> None:
    plan = sweep.parse(["recipe=tiny/gipo", "parallel.tensor=1,2", "nproc=2"])
    for point in plan.points:
        assert sweep.command(plan, point, RECIPES)[1:5] == [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
        ]
    with pytest.raises(UserError, match="1 problem"):
        sweep.command(
            sweep.parse(["recipe=tiny/gipo", "parallel.tensor=1,2"]),
            ("parallel.tensor=2",),
            RECIPES,
        )


def fake_runs(monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> list[list[str]]:
    started: list[list[str]] = []

    def start(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(words)
        return subprocess.CompletedProcess(words, codes[len(started) - 1])

    monkeypatch.setattr(sweep.subprocess, "run", start)
    return started


def test_a_failed_run_is_reported_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = fake_runs(monkeypatch, [0, 2, 0])
    assert sweep.main(["recipe=tiny/gipo", "run.seed=0..2"], RECIPES) == 1
    assert len(started) == 3
    shown = capsys.readouterr()
    assert "[3/3]" in shown.out and "2 of 3 runs finished" in shown.out
    assert "failed with 2:" in shown.err and "run.seed=1" in shown.err


def test_nothing_starts_before_all_are_checked_and_dry_starts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = fake_runs(monkeypatch, [])
    with pytest.raises(UserError):
        sweep.main(["recipe=tiny/gipo", "run.keep=1,0"], RECIPES)
    assert sweep.main(["recipe=tiny/gipo", "run.keep=1,2", "dry=true"], RECIPES) == 0
    assert started == []


def test_bad_settings_exit_with_2(tmp_path: Path) -> None:
    words = ("recipe=tiny/gipo", "run.sed=0..4")
    done = forked.run(Path(sweep.__file__), *words, folder=tmp_path)
    assert (
        done.code == 2 and "did you mean 'seed'?" in done.stderr and "Traceback" not in done.stderr
    )
