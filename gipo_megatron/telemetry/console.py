"""A live progress bar on a terminal, one line a step everywhere else, and the same lines in
log.txt."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import rich.console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

# what a line shows, as far as the run has it: metric -> short name
KEY_FIGURES = {
    "sft/loss": "loss",
    "rm/loss": "loss",
    "rm/accuracy": "accuracy",
    "dpo/loss": "loss",
    "dpo/accuracy": "accuracy",
    "reward/score_mean": "score",
    "kl/mean": "kl",
    "groups/gap": "gap",
    "weights/min": "w min",
    "rollout/length_mean": "length",
    "eval/score": "eval score",
    "eval/gold": "eval gold",
    "eval/accuracy": "eval accuracy",
    "eval/loss": "eval loss",
}


def key_figures(values: Mapping[str, float]) -> str:
    """`score 0.412  kl 1.93  gap 0.25`"""
    shown = [(short, values[name]) for name, short in KEY_FIGURES.items() if name in values]
    return "  ".join(f"{short} {value:.4g}" for short, value in shown)


def duration(seconds: float) -> str:
    """75 -> 1:15; 3700 -> 1:01:40"""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Pace:
    """Time left, from the mean of the last steps' seconds (the first step compiles, allocates and
    loads: it counts only alone)."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._seconds: list[float] = []
        self._mark = time.perf_counter()

    def step(self, step: int) -> float:
        """Seconds left after `step`."""
        now = time.perf_counter()
        self._seconds = [*self._seconds, now - self._mark][-20:]
        self._mark = now
        recent = self._seconds[1:] or self._seconds
        return sum(recent) / len(recent) * max(self._total - step, 0)

    def restart(self) -> None:
        self._seconds, self._mark = [], time.perf_counter()


def step_line(step: int, total_steps: int, values: Mapping[str, float], left: float) -> str:
    width = len(str(total_steps))
    seconds = f"  {values['time/step_seconds']:.2f} s" if "time/step_seconds" in values else ""
    return (
        f"step {step:>{width}}/{total_steps}  {key_figures(values)}{seconds}  left {duration(left)}"
    )


class LogFile:
    """log.txt: one line a step, alerts, and where a run was resumed. Nothing is ever cut from
    it."""

    def __init__(self, path: Path, total_steps: int) -> None:
        self._path, self._total = path, total_steps
        self._pace = Pace(total_steps)
        self._file: TextIO | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step_line(step, self._total, values, self._pace.step(step)))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def alert(self, step: int, message: str) -> None:
        self._write(f"ALERT {message}")

    def phase(self, name: str) -> None:
        pass

    def resume(self, step: int) -> None:
        self._pace.restart()
        self._write(f"resumed after step {step}" if step else "started")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: str) -> None:
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        self._file.flush()


class Console:
    """The terminal of rank 0: a bar with phase and time left over the key figures; plain lines when
    nobody watches live."""

    def __init__(
        self,
        total_steps: int,
        title: str,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
    ) -> None:
        self._total = total_steps
        self._pace = Pace(total_steps)
        # last known: held-out figures stay between evaluations
        self._figures: dict[str, float] = {}
        self._console = rich.console.Console(
            file=stream or sys.stdout, force_terminal=live, highlight=False, soft_wrap=True
        )
        self._live: Live | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left {task.fields[left]}", markup=False),
                TextColumn("{task.fields[phase]}", style="cyan", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=total_steps, left="-:--", phase="")
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        left = self._pace.step(step)
        if self._live is None:
            self._console.print(Text(step_line(step, self._total, values, left)))
            return
        self._figures |= {name: values[name] for name in KEY_FIGURES if name in values}
        self._live.start()
        self._bar.update(self._task, completed=step, left=duration(left))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def alert(self, step: int, message: str) -> None:
        self._console.print(Text(f"ALERT {message}", style="yellow"))

    def phase(self, name: str) -> None:
        if self._live is not None:
            self._live.start()
            self._bar.update(self._task, phase=name)

    def resume(self, step: int) -> None:
        self._pace.restart()
        if self._live is not None:
            self._bar.update(self._task, completed=step)
        if step:
            self._console.print(Text(f"resumed after step {step}"))

    def close(self) -> None:
        if self._live is not None:
            self._bar.update(self._task, phase="")
            self._live.stop()

    def _render(self) -> rich.console.RenderableType:
        return rich.console.Group(
            self._bar.get_renderable(),
            Text("  " + key_figures(self._figures), overflow="ellipsis", no_wrap=True),
        )
