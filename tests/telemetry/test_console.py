from __future__ import annotations

import io
import re
from pathlib import Path

from gipo_megatron.telemetry.console import Console, LogFile, Pace, duration, key_figures, step_line


def test_a_line_shows_what_the_run_has() -> None:
    values = {
        "reward/score_mean": 0.41234,
        "kl/mean": 1.9,
        "policy/loss": 3.0,
        "time/step_seconds": 2.0,
    }
    assert key_figures(values) == "score 0.4123  kl 1.9"
    assert step_line(3, 100, values, 75) == "step   3/100  score 0.4123  kl 1.9  2.00 s  left 1:15"


def test_durations() -> None:
    assert [duration(x) for x in (0, 59.6, 75, 3700, float("nan"))] == [
        "0:00",
        "1:00",
        "1:15",
        "1:01:40",
        "-:--",
    ]


def test_time_left_forgets_the_first_step(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("gipo_megatron.telemetry.console.time.perf_counter", lambda: now[0])
    pace = Pace(10)
    now[0] = 100.0
    assert pace.step(1) == 900.0
    now[0] = 102.0
    assert pace.step(2) == 16.0
    assert pace.step(12) == 0.0


def test_without_a_terminal_one_plain_line_a_step() -> None:
    out = io.StringIO()
    console = Console(2, "run", out)
    console.resume(0)
    console.phase("rollout")
    console.log(1, {"kl/mean": 1.0, "eval/score": 0.5})
    console.alert(1, "step 1: [bold]kl[/bold] is high " + "x" * 200)
    console.samples(1, [{"prompt": "x"}])
    console.log(2, {"kl/mean": 2.0})
    console.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in out.getvalue()
    assert lines[0].startswith("step 1/2  kl 1  eval score 0.5")
    assert lines[1].startswith("ALERT step 1: [bold]kl[/bold] is high xxx")
    assert lines[2].startswith("step 2/2  kl 2")


def test_on_a_terminal_a_bar_with_phase_and_figures(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    out = io.StringIO()
    console = Console(40, "[hh] gipo", out, live=True)
    console.resume(10)
    console.phase("rollout")
    console.log(11, {"reward/score_mean": 0.5, "eval/score": 0.25})
    console.log(12, {"reward/score_mean": 0.75})
    console.alert(12, "step 12: look [here]")
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "[hh] gipo" in text and "12/40" in text and "left " in text
    assert "score 0.75  eval score 0.25" in text  # the held-out score stays
    assert "resumed after step 10" in text and "ALERT step 12: look [here]" in text


def test_log_file_keeps_everything(tmp_path: Path) -> None:
    for resumed, step in ((0, 1), (1, 2)):
        log = LogFile(tmp_path / "log.txt", 2)
        log.resume(resumed)
        log.log(step, {"sft/loss": 2.0})
        log.alert(step, "step: careful")
        log.close()
    lines = [line.split("  ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line.split("  left")[0] for line in lines] == [
        "started",
        "step 1/2  loss 2",
        "ALERT step: careful",
        "resumed after step 1",
        "step 2/2  loss 2",
        "ALERT step: careful",
    ]
