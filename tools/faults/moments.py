"""The moment of a fault: before a chosen write of a process, counted from its start."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Python's audit events of a file system that changes; "open" is one where the file is for writing
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate")
WRITABLE = os.O_WRONLY | os.O_RDWR


def begin(rank: int, folder: Path, at: int = 0, of: int = 0, on: int = 0, number: int = 0) -> None:
    """Count this process's writes below FOLDER, its working folder; before the write `at` of rank
    `of` send rank `on` the signal `number`.

    Figures are not drawn, which would be three quarters of a tiny run's time; their files are
    written.
    """
    Figure.savefig = _no_drawing  # type: ignore[method-assign]
    os.environ["GIT_DIR"] = os.devnull  # no commit is recorded: a checkout may change meanwhile
    place = f"{folder}{os.sep}"
    _file(folder, "process", rank).write_text(str(os.getpid()), encoding="utf-8")
    counter = os.open(_file(folder, "writes", rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    found = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal found
        if not _changes(event, arguments, place):
            return
        found += 1
        os.pwrite(counter, b"%d" % found, 0)
        if found == at and rank == of:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(int(_file(folder, "process", on).read_text(encoding="utf-8")), number)

    sys.addaudithook(hook)


def _file(folder: Path, what: str, rank: int) -> Path:
    """Return the name of a small file beside FOLDER."""
    return folder.with_name(f"{folder.name}_{what}_{rank}")


def writes(folder: Path, ranks: int) -> list[int]:
    """Return how many writes each rank made in the last run there."""
    files = [_file(folder, "writes", rank) for rank in range(ranks)]
    return [int(file.read_text(encoding="utf-8") or "0") if file.exists() else 0 for file in files]


def _changes(event: str, arguments: tuple[Any, ...], place: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        if not flags & WRITABLE:
            return False
    elif event in CHANGES:
        path = arguments[0]
    else:
        return False
    if isinstance(path, int):
        return False
    name = os.fsdecode(path)
    return not os.path.isabs(name) or name.startswith(place)


def _no_drawing(figure: Figure, file: Any, **more: Any) -> None:
    file.write(b"not drawn\n")
