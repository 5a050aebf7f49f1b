"""Sinks of a run's numbers: files and the terminal. Only rank 0 has sinks."""

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

from gipo_megatron.files import append_jsonl, read_jsonl, write_jsonl
from gipo_megatron.telemetry.console import Headline, Pace, duration, key_figures, step_line


class Sink:
    """One destination. `resume` comes before the first `log`; steps rise."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], kind: str = "samples") -> None:
        """Take responses of a step; kind: samples (of training) | held_out."""

    def alert(self, step: int, message: str) -> None: ...

    def phase(self, name: str) -> None:
        """Show the step's phase from now on; "" between phases."""

    def resume(self, step: int) -> None:
        """Continue after `step`, the checkpoint's, and remove later rows; 0: remove all."""

    def close(self) -> None: ...


class Jsonl(Sink):
    """metrics.jsonl (one object a step), samples.jsonl, held_out.jsonl, alerts.jsonl. NaN and
    infinity are null."""

    FILES = ("metrics.jsonl", "samples.jsonl", "held_out.jsonl", "alerts.jsonl")

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._write("metrics.jsonl", [{"step": step, **values}])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], kind: str = "samples") -> None:
        self._write(f"{kind}.jsonl", [{"step": step, **row} for row in rows])

    def alert(self, step: int, message: str) -> None:
        self._write("alerts.jsonl", [{"step": step, "message": message}])

    def resume(self, step: int) -> None:
        """Keep the rows of steps <= `step`. Raises UserError for an unreadable line."""
        for file in (self._folder / name for name in self.FILES):
            if file.exists():
                rows = [row for _, row in read_jsonl(file, "remove it, or move the file away")]
                write_jsonl(file, [row for row in rows if step and row["step"] <= step])

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        append_jsonl(self._folder / name, [_finite(row) for row in rows])


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, and lone surrogates, which are no Unicode text, by \\u…"""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


class LogFile(Sink):
    """log.txt: one line a step, alerts, and where a run was resumed. Only ever appended."""

    def __init__(self, path: Path, total_steps: int, headline: Headline) -> None:
        self._path, self._total, self._headline = path, total_steps, headline
        self._pace = Pace(total_steps)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        left = self._pace.step(step)
        self._write(step_line(step, self._total, values, left, self._headline))

    def alert(self, step: int, message: str) -> None:
        self._write(f"ALERT {message}")

    def resume(self, step: int) -> None:
        self._pace.restart()
        self._write(f"resumed after step {step}" if step else "started")

    def _write(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


class Console(Sink):
    """Terminal: a bar with phase and time left over the key figures; elsewhere one line a step."""

    def __init__(
        self,
        total_steps: int,
        title: str,
        headline: Headline,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
    ) -> None:
        self._total, self._headline = total_steps, headline
        self._pace = Pace(total_steps)
        self._known: dict[str, float] = {}  # held-out figures stay between evaluations
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
            line = step_line(step, self._total, values, left, self._headline)
            self._console.print(Text(line))
            return
        self._known |= values
        self._live.start()
        self._bar.update(self._task, completed=step, left=duration(left))

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
        figures = "  " + key_figures(self._known, self._headline)
        line = Text(figures, overflow="ellipsis", no_wrap=True)
        return rich.console.Group(self._bar.get_renderable(), line)
