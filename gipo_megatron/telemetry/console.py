"""Text for terminals: the figures and time left of a run, and the progress of a command."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import rich.console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gipo_megatron.screen import shown

Headline = Sequence[tuple[str, str]]  # metric, words: what an algorithm shows first

# shown after the headline, where a run has them
MORE_FIGURES: Headline = (
    ("kl/mean", "kl"),
    ("groups/gap", "gap"),
    ("weights/min", "w min"),
    ("rollout/length_mean", "length"),
)


def key_figures(values: Mapping[str, float], headline: Headline) -> str:
    """`score 0.412  kl 1.93  gap 0.25`"""
    shown = [(words, values[name]) for name, words in (*headline, *MORE_FIGURES) if name in values]
    return "  ".join(f"{words} {value:.4g}" for words, value in shown)


def step_line(
    step: int, total_steps: int, values: Mapping[str, float], left: float, headline: Headline
) -> str:
    place = f"step {step:>{len(str(total_steps))}}/{total_steps}"
    seconds = f"  {values['time/step_seconds']:.2f} s" if "time/step_seconds" in values else ""
    return f"{place}  {key_figures(values, headline)}{seconds}  left {duration(left)}"


def duration(seconds: float) -> str:
    """75 -> 1:15; 3700 -> 1:01:40"""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Pace:
    """Time left, from the mean of the last steps' seconds. The first step compiles, allocates and
    loads: it counts only while it is the only one."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._seconds: list[float] = []
        self._mark = time.perf_counter()

    def step(self, step: int) -> float:
        """Return the seconds left after `step`."""
        now = time.perf_counter()
        self._seconds = [*self._seconds, now - self._mark][-20:]
        self._mark = now
        recent = self._seconds[1:] or self._seconds
        return sum(recent) / len(recent) * max(self._total - step, 0)

    def restart(self) -> None:
        self._seconds, self._mark = [], time.perf_counter()


class Display:
    """Progress of a command: bars on a terminal, plain lines elsewhere; `shown` false: nothing."""

    def __init__(self, shown: bool = True) -> None:
        self.console = rich.console.Console(quiet=not shown, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self.console.print(shown(text), markup=False)

    @contextmanager
    def counting(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Yield a function that takes how many more are done; `done` of `total` are at the start.

        Without a terminal, every tenth is a line.
        """
        self.line(f"{title}: {done} of {total} done")
        columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
        with self._bar(title, total, *columns, TimeRemainingColumn(), done=done) as update:

            def more(count: int) -> None:
                nonlocal done
                before, done = done, done + count
                if update is not None:
                    update(completed=done)
                elif 10 * done // max(total, 1) > 10 * before // max(total, 1):
                    self.line(f"{title}: {done} of {total}")

            yield more

    @contextmanager
    def tensors(self, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
        """Yield a function that takes each tensor's name and bytes; `total`: bytes of all."""
        columns = (DownloadColumn(binary_units=True), TimeRemainingColumn())
        with self._bar(title, total, *columns, TextColumn("{task.fields[name]}")) as update:
            if update is None:
                self.line(title)
            yield lambda name, size: update(advance=size, name=name) if update else None

    @contextmanager
    def waiting(self, title: str) -> Iterator[None]:
        """Show a spinner and the seconds; for work of unknown length."""
        with self._bar(title, None, TimeElapsedColumn()) as update:
            if update is None:
                self.line(title)
            yield

    @contextmanager
    def _bar(
        self, title: str, total: int | None, *columns: ProgressColumn, done: int = 0
    ) -> Iterator[Callable[..., None] | None]:
        """Yield the bar's update function; None where there is no terminal."""
        if not self.console.is_terminal:
            yield None
            return
        text = TextColumn("{task.description}", markup=False)
        start = (SpinnerColumn(), text) if total is None else (text, BarColumn())
        with Progress(*start, *columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=total, completed=done, name="")
            yield partial(bar.update, task)
