"""Bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
import rich.progress


class Progress:
    """What a conversion shows; `shown` false (other ranks, tests): nothing."""

    def __init__(self, shown: bool = True) -> None:
        self.console = rich.console.Console(quiet=not shown, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def tensors(self, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
        """Yields what to call with every tensor's name and bytes."""
        if not self.console.is_terminal:
            self.line(title)
            yield lambda name, size: None
            return
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(binary_units=True),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[name]}"),
        )
        with rich.progress.Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=total, name="")
            yield lambda name, size: bar.update(task, advance=size, name=name)

    @contextmanager
    def waiting(self, title: str) -> Iterator[None]:
        """For what cannot say how far it is."""
        if not self.console.is_terminal:
            self.line(title)
            yield
            return
        columns = (
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=self.console, transient=True) as bar:
            bar.add_task(title, total=None)
            yield
