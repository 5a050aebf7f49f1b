from __future__ import annotations

import io
import re
from pathlib import Path

import rich.console

from gipo_megatron.telemetry.console import Display, Pace, duration, key_figures, step_line
from gipo_megatron.telemetry.sinks import Console, LogFile

HEADLINE = (("eval/score", "held-out score"), ("reward/score_mean", "score"), ("sft/loss", "loss"))


def test_a_line_shows_what_the_run_has() -> None:
    values = {
        "reward/score_mean": 0.41234,
        "kl/mean": 1.9,
        "policy/loss": 3.0,
        "time/step_seconds": 2.0,
    }
    assert key_figures(values, HEADLINE) == "score 0.4123  kl 1.9"
    assert (
        step_line(3, 100, values, 75, HEADLINE)
        == "step   3/100  score 0.4123  kl 1.9  2.00 s  left 1:15"
    )


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
    console = Console(2, "run", HEADLINE, out)
    console.resume(0)
    console.phase("rollout")
    console.log(1, {"kl/mean": 1.0, "eval/score": 0.5})
    console.alert(1, "step 1: [bold]kl[/bold] is high " + "x" * 200)
    console.samples(1, [{"prompt": "x"}])
    console.log(2, {"kl/mean": 2.0})
    console.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in out.getvalue()
    assert lines[0].startswith("step 1/2  held-out score 0.5  kl 1")
    assert lines[1].startswith("ALERT step 1: [bold]kl[/bold] is high xxx")
    assert lines[2].startswith("step 2/2  kl 2")


def test_on_a_terminal_a_bar_with_phase_and_figures(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    out = io.StringIO()
    console = Console(40, "[hh] gipo", HEADLINE, out, live=True)
    console.resume(10)
    console.phase("rollout")
    console.log(11, {"reward/score_mean": 0.5, "eval/score": 0.25})
    console.log(12, {"reward/score_mean": 0.75})
    console.alert(12, "step 12: look [here]")
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "[hh] gipo" in text and "12/40" in text and "left " in text
    assert "held-out score 0.25  score 0.75" in text  # the held-out score stays
    assert "resumed after step 10" in text and "ALERT step 12: look [here]" in text


def test_log_file_keeps_everything(tmp_path: Path) -> None:
    for resumed, step in ((0, 1), (1, 2)):
        log = LogFile(tmp_path / "log.txt", 2, HEADLINE)
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


def display(live: bool) -> tuple[Display, io.StringIO]:
    shown, out = Display(), io.StringIO()
    shown.console = rich.console.Console(file=out, force_terminal=live, soft_wrap=True)
    return shown, out


def test_elsewhere_than_on_a_terminal_progress_is_a_line_for_every_tenth() -> None:
    shown, out = display(live=False)
    with shown.counting("[a]: verdicts", 40, 2) as more:
        for _ in range(38):
            more(1)
    with shown.tensors("reading", 100) as seen:
        seen("weight", 50)
    with shown.waiting("writing"):
        pass
    tenths = [f"[a]: verdicts: {n} of 40" for n in range(4, 44, 4)]
    assert out.getvalue().splitlines() == [
        "[a]: verdicts: 2 of 40 done", *tenths, "reading", "writing"
    ]  # fmt: skip


def test_on_a_terminal_progress_is_a_bar(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    shown, out = display(live=True)
    with shown.counting("verdicts", 40, 2) as more:
        more(38)
    with shown.tensors("reading", 2048) as seen:
        seen("layers.0.weight", 2048)
    with shown.waiting("writing"):
        pass
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "40/40" in text and "layers.0.weight" in text and "2.0/2.0 KiB" in text
    assert "writing" in text and text.count("verdicts: 2 of 40 done") == 1


def test_progress_of_another_rank_is_silent(capsys) -> None:
    shown = Display(shown=False)
    with shown.counting("verdicts", 4) as more:
        more(4)
    with shown.waiting("writing"):
        shown.line("x")
    assert capsys.readouterr().out == ""
