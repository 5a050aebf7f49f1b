"""The campaign of faults: its few trials that take a second each, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import campaign
from tools.faults import kills, systems
from tools.faults.trial import Bench, Lost, Trial


@pytest.mark.multiprocess
def test_a_small_campaign_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = campaign.main(["--small", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) >= 4 and not [row for row in rows if row["lost"]]
    assert not (tmp_path / "lost").exists()


def test_every_command_is_killed_twenty_times() -> None:
    trials = kills.trials()
    assert {trial.line for trial in trials} == set(kills.SURVIVED)
    assert len({(trial.line, trial.case) for trial in trials}) == len(trials)
    for system in systems.SYSTEMS:
        killed = [t.case for t in trials if t.line == f"kill -9: {system.name}"]
        assert len(killed) == 20
        assert {case.split(",")[0] for case in killed} == set(system.layouts)


def survives(bench: Bench) -> None:
    (bench.folder / "file").write_text(str(bench.random.random()))


def loses(bench: Bench) -> None:
    (bench.folder / "evidence").touch()
    raise Lost("it broke\nwith all that it printed")


def breaks(bench: Bench) -> None:
    raise OSError("no such file")


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A campaign of one part, weather."""
    trials = [
        Trial("calm", "one", survives),
        Trial("storm", "first", loses),
        Trial("storm", "second", breaks, known="the wind is too strong"),
        Trial("storm", "third", survives),
    ]
    survived = {"calm": "all is as before", "storm": "nothing is lost"}
    weather = SimpleNamespace(trials=lambda: trials, SURVIVED=survived)
    monkeypatch.setattr(campaign, "PARTS", ("weather",))
    monkeypatch.setitem(sys.modules, "tools.faults.weather", weather)


def test_the_table_names_what_was_lost(
    part: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert campaign.main(["--out", str(tmp_path)]) == 1
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == "| line | survived | what survived means | seconds |"
    assert table[2:] == [
        "| calm | 1 of 1 | all is as before | 0 |",
        "| storm | 1 of 3 | nothing is lost; **not survived**: it broke | 0 |",
    ]
    assert (tmp_path / "lost" / "storm__first" / "evidence").exists()
    assert "storm: second: LOST: OSError: no such file" in capsys.readouterr().out


def test_a_second_start_goes_on(
    part: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert campaign.main(["--out", str(tmp_path), "--only", "calm"]) == 0
    first = (tmp_path / "results.jsonl").read_text()
    assert campaign.main(["--out", str(tmp_path), "--only", "calm"]) == 0
    assert (tmp_path / "results.jsonl").read_text() == first
    assert capsys.readouterr().out.count("calm: one: survived") == 1
    assert campaign.main(["--out", str(tmp_path)]) == 1
    assert (tmp_path / "results.jsonl").read_text().startswith(first)


def test_a_known_loss_is_named_and_does_not_fail(part: None, tmp_path: Path) -> None:
    """`first`, a loss without a known reason, counts as survived here: it would fail."""
    (tmp_path / "results.jsonl").write_text(
        json.dumps({"line": "storm", "case": "first", "seconds": 0.0}) + "\n"
    )
    assert campaign.main(["--out", str(tmp_path)]) == 0
    assert "| storm | 2 of 3 | nothing is lost; **not survived**: the wind is too strong |" in (
        (tmp_path / "table.md").read_text()
    )


def test_another_seed_or_an_unknown_line_is_refused(part: None, tmp_path: Path) -> None:
    campaign.main(["--out", str(tmp_path), "--only", "calm"])
    with pytest.raises(campaign.UserError, match="has trials of seed 0"):
        campaign.main(["--out", str(tmp_path), "--seed", "1"])
    with pytest.raises(campaign.UserError, match="no line 'rain'"):
        campaign.main(["--out", str(tmp_path), "--only", "rain"])
