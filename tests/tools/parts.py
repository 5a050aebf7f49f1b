"""Parts for the tests of tools/gpu_verify.py: they need no model, and do what a part may do
wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tools.gpu.bench import Bench, Figure, NotRun, below, figure
from tools.gpu_verify import Part

HANG_LIMIT = 0.1  # seconds of an H100; SLOWER times that on a CPU


def note(bench: Bench, what: str) -> None:
    """One more line in OUT/notes.txt."""
    with (bench.out / "notes.txt").open("a") as file:
        file.write(f"{what}\n")


def good(bench: Bench) -> Iterator[Figure]:
    note(bench, "good")
    print("chatter on stdout")
    yield figure("number", 1.5)
    yield below("small", 1.0, 2.0)


def last(bench: Bench) -> Iterator[Figure]:
    note(bench, "last")
    yield figure("process", os.getpid())


def misses(bench: Bench) -> Iterator[Figure]:
    note(bench, "misses")
    yield below("small", 3.0, 2.0)
    yield figure("not a number", float("nan"))


def raises(bench: Bench) -> Iterator[Figure]:
    note(bench, "raises")
    yield figure("before", 1)
    raise RuntimeError("the reason\nand more")


def dies(bench: Bench) -> Iterator[Figure]:
    """As from outside: SIGKILL in the midst of a part."""
    note(bench, "dies")
    yield figure("before", 1)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(bench: Bench) -> Iterator[Figure]:
    """With a child, which must go, too."""
    child = subprocess.Popen(["sleep", "600"])
    Path(bench.out / "child.txt").write_text(str(child.pid))
    yield figure("before", 1)
    child.wait()


def impossible(bench: Bench) -> Iterator[Figure]:
    yield figure("before", 1)
    raise NotRun("something is missing: get it")


def part(name: str, limit: float = 60, **more: bool) -> Part:
    return Part(name, f"tests.tools.parts:{name}", 1, limit, **more)  # type: ignore[arg-type]


PARTS = (
    part("good"),
    part("dies"),
    part("hangs", HANG_LIMIT),
    part("raises"),
    part("misses"),
    part("impossible"),
    part("last"),
)
