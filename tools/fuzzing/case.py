"""One input of a command, and the check of what a user then sees."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gipo_megatron import cli

CPU, WALL = 10.0, 200.0  # seconds of a case that takes 0.1 s alone
LINES, CHARACTERS = 50, 6000  # of one screen
# what a terminal obeys, but for line breaks and tabs
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Fault(AssertionError):
    """A broken rule: its kind, then details."""


class Late(BaseException):
    """The end of a case that hangs."""


@dataclass(frozen=True)
class Case:
    """Words of a command, started in a folder that holds `files`."""

    words: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    # a refusal contains one of these: the file or the key at fault
    names: tuple[str, ...] = ()
    writes: str = ""  # the folder that a command without an error writes

    def __repr__(self) -> str:
        files = {name: content[:2000] for name, content in self.files.items()}
        return f"Case({self.words!r}, {files!r}, {self.names!r}, {self.writes!r})"


@dataclass(frozen=True)
class Screen:
    """Exit code and texts that the user sees."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def limited() -> Iterator[list[bool]]:
    """Raise Late in the block after CPU or WALL seconds; the list is filled then, even where the
    error is caught. A block that runs no Python code ends the process with a traceback."""
    fired: list[bool] = []

    def stop(*_: Any) -> None:
        fired.append(True)
        raise Late

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, CPU), signal.ITIMER_REAL: (signal.SIGALRM, WALL)}
    before = {number: signal.signal(number, stop) for number, _ in timers.values()}
    running = {timer: signal.setitimer(timer, s) for timer, (_, s) in timers.items()}
    faulthandler.dump_traceback_later(2 * WALL, exit=True, file=sys.__stderr__)
    try:
        yield fired
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer, (seconds, _) in running.items():  # pytest-timeout's
            signal.setitimer(timer, seconds)
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def global_state() -> Iterator[None]:
    """Undo what commands change in a process that ends with them."""
    path, variables = list(sys.path), dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            sys.path[:] = path
            os.environ.clear()
            os.environ.update(variables)


def run(case: Case, folder: Path) -> Screen:
    """Start the command in `folder`, which is emptied before; raise Fault for a broken rule."""
    fill(folder, case.files)
    before = listing(folder)
    screen = observed(lambda: cli.main(list(case.words)), folder)
    check(screen, case.names)
    after = listing(folder)
    if case.writes:  # what differs from its source stays for a look
        allowed = case.writes if screen.code == 0 else f"{case.writes}.mismatch"
        after = {name: facts for name, facts in after.items() if _top(name) != allowed}
    if before != after:
        raise Fault(f"written: {sorted(after.items() ^ before.items())[:4]}")
    return screen


def _top(name: str) -> str:
    return name.split("/")[0]


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make `folder` hold these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def observed(action: Callable[[], int], folder: Path) -> Screen:
    """Return what a user sees of a command in `folder`. Raises Fault for a traceback or a hang."""
    out, err = io.StringIO(), io.StringIO()
    broken = ""
    with (
        global_state(),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        limited() as late,
    ):
        try:
            code = action()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            code, broken = 1, where(error)
    if late:
        raise Fault(f"hang: {broken or 'caught as an error'}")
    if broken:
        raise Fault(f"traceback: {broken}")
    return Screen(code, out.getvalue(), err.getvalue())


def check(screen: Screen, names: Sequence[str]) -> None:
    """Raise Fault for another exit code, more than a screen, or an error without any of `names`."""
    if screen.code not in (0, 2):
        raise Fault(f"exit code {screen.code}: {screen.err[-300:]}")
    if "Traceback" in screen.err:
        raise Fault(f"a traceback on the screen: {screen.err[-300:]}")
    if screen.err.count("\n") > LINES or len(screen.err) > CHARACTERS:
        lines = screen.err.count("\n")
        raise Fault(f"more than one screen: {lines} lines, {len(screen.err)} characters")
    for text in (screen.err, screen.out):
        if found := CONTROL.search(text):
            at = found.start()
            raise Fault(f"a control character on the screen: {text[max(at - 60, 0) : at + 20]!r}")
    said = re.sub(r"^.*: \d+ problems?\n", "", screen.err)  # names the recipe, not a place in it
    if screen.code == 2 and names and not any(name in said for name in names):
        raise Fault(f"names none of {names[:6]}: {screen.err[:300]}")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return {path: (size, time of change)} of all files and folders below."""
    found = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        time = 0 if path.is_dir() else facts.st_mtime_ns
        found[str(path.relative_to(folder))] = (0 if path.is_dir() else facts.st_size, time)
    return found


def where(error: BaseException) -> str:
    """Return kind and first line of an error with the last places in this package."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "gipo_megatron" in f.filename][-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(ours))
    line = (str(error).splitlines() or [""])[0][:160]
    return f"{type(error).__name__}: {line} at {places}"
