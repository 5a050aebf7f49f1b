"""Runs a script in processes forked from a server that has imported torch and Megatron.

A start costs a tenth of a second; a fresh Python needs seven seconds of imports. Tests of the
launchers themselves start a fresh Python, as a user does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

from gipo_megatron.launcher import world_variables

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


@dataclass(frozen=True)
class Finished:
    """What a script's processes left."""

    code: int  # the first exit code that is not 0, else 0
    stdout: str  # of all ranks, one after the other
    stderr: str


def run(
    script: Path, *arguments: str, ranks: int = 1, folder: Path = ROOT, timeout: float = 560
) -> Finished:
    """Run `script arguments…` on `ranks` processes of one world, in `folder`.

    Raises AssertionError with the end of their output when they take longer than `timeout`
    seconds. When one rank fails, the others are ended.
    """
    # where the ranks meet; it is made here, so its port cannot be taken in between
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def world(rank: int) -> dict[str, str]:
        return world_variables(rank, ranks, store.port) if ranks > 1 else {}

    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / str(rank) for rank in range(ranks)]
        started = [
            CONTEXT.Process(target=_run, args=(script, arguments, folder, output, world(rank)))
            for rank, output in enumerate(outputs)
        ]
        for process in started:
            process.start()
        late = not _join(started, time.monotonic() + timeout)
        stdout, stderr = (
            "".join(output.with_suffix(kind).read_text(errors="replace") for output in outputs)
            for kind in (".out", ".err")
        )
    codes = [process.exitcode or 0 for process in started]
    tail = f"{stdout[-3000:]}\n{stderr[-6000:]}"
    assert not late, f"{script.name}: no end after {timeout} s\n{tail}"
    return Finished(next((code for code in codes if code), 0), stdout, stderr)


def _join(started: list[multiprocessing.context.ForkServerProcess], end: float) -> bool:
    """Wait for all processes; end the others when one fails or at `end`. Returns False at `end`."""
    running = {process.sentinel: process for process in started}
    failed, late = False, False
    while running and not failed and not late:
        done = wait(list(running), timeout=max(0.0, end - time.monotonic()))
        late = not done
        failed = any(running.pop(sentinel).exitcode for sentinel in done)
    for process in running.values():
        process.kill()
    for process in started:
        process.join()
    return not late


def _run(
    script: Path, arguments: tuple[str, ...], folder: Path, output: Path, world: dict[str, str]
) -> None:
    """Be the script, in a forked process."""
    for stream, kind in ((1, ".out"), (2, ".err")):
        file = os.open(output.with_suffix(kind), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    os.environ.update(world, WANDB_MODE="offline")
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
