from __future__ import annotations

from pathlib import Path

import pytest

from gipo_megatron import cli
from gipo_megatron.commands.plot import main, parse
from tests.reports.synthetic import ppo_run, sft_run


def test_one_run_draws_into_its_folder(tmp_path: Path, capsys) -> None:
    folder = sft_run(tmp_path / "sft")
    assert main([str(folder)]) == 0
    assert sorted(p.name for p in (folder / "figures").iterdir()) == [
        "loss.pdf",
        "loss.png",
        "loss.svg",
    ]
    out = capsys.readouterr().out
    assert "3 files in" in out and "not drawn: kl (no kl/mean, kl/coef_mean)" in out


def test_several_runs_draw_into_out(tmp_path: Path) -> None:
    runs = [str(sft_run(tmp_path / f"run_{s}")) for s in range(2)]
    assert main([*runs, f"out={tmp_path}/all", f"report={tmp_path}/report.html"]) == 0
    assert (tmp_path / "report.html").is_file()
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [
        "loss.pdf",
        "loss.png",
        "loss.svg",
    ]
    assert parse(runs)[1] == "figures"


def test_the_frontier_is_written_too(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "gipo", steps=10)
    assert main([str(run)]) == 0
    written = {p.name: p.stat().st_size for p in (run / "figures").iterdir()}
    assert {"frontier.pdf", "frontier.png", "frontier.svg", "reward.pdf"} <= written.keys() and min(
        written.values()
    ) > 1000


def test_mistakes_exit_2_on_one_screen(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        [str(tmp_path / "nope")],
        [str(tmp_path / "empty")],
        ["--out", "x"],
        ["outt=x", str(tmp_path)],
    ]
    for arguments in cases:
        with pytest.raises(SystemExit, match="2"):
            cli.main(["plot", *arguments])
        error = capsys.readouterr().err
        assert "Traceback" not in error and 0 < len(error.splitlines()) <= 5 and "fix:" in error
    assert len(cases) == 4 and cli.main(["plot", "--help"]) == cli.main(["plot"]) == 0
