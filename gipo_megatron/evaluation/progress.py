"""How far an evaluation is: a bar on a terminal, a line for every tenth elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)
Done = Callable[[int], None]


class Counter:
    """`shown` false (other ranks): nothing."""

    def __init__(self, shown: bool = True) -> None:
        self.console = rich.console.Console(quiet=not shown, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def counting(self, title: str, total: int, done: int = 0) -> Iterator[Done]:
        """Yields what to call with how many more are done; `done` of `total` are at the start."""
        self.line(f"{title}: {done} of {total} done")
        if not self.console.is_terminal:
            yield self._lines(title, total, done)
            return
        with Progress(*COLUMNS, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda more: bar.update(task, advance=more)

    def _lines(self, title: str, total: int, done: int) -> Done:
        def more(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            if 10 * done // max(total, 1) > 10 * before // max(total, 1):
                self.line(f"{title}: {done} of {total}")

        return more
