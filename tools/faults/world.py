"""The ranks of a script, forked from a server that has imported torch and Megatron: a start costs a
tenth of a second, where a fresh Python needs seven seconds of imports.

with world(script, "recipe=tiny/sft", ranks=2) as ranks:
    ranks.kill(1)
    finished = ranks.wait(60)
"""

from __future__ import annotations

import math
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn

from torch.distributed import TCPStore

from gipo_megatron.launcher import PATIENCE, world_variables
from tools.faults.trial import Lost

ROOT = Path(__file__).resolve().parents[2]
GIPO = ROOT / "gipo_megatron" / "cli.py"  # world(GIPO, "train", "recipe=…")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tools.faults.preloaded"])
TICK = 0.002  # seconds between two looks


@dataclass(frozen=True)
class Finished:
    """Exit codes and output of a script's ranks."""

    codes: tuple[int, ...]  # exit code of each rank; -N: ended by signal N
    stdout: str  # of all ranks, one after the other
    stderr: str

    @property
    def code(self) -> int:
        """The first exit code that is not 0, else 0."""
        return next((code for code in self.codes if code), 0)

    def tail(self) -> str:
        return f"exit {self.codes}\n{self.stdout[-3000:]}\n{self.stderr[-6000:]}"


@dataclass
class World:
    """Running ranks, each the leader of a session of its own."""

    name: str
    processes: Sequence[ForkServerProcess]
    outputs: Sequence[Path]

    def ended(self, rank: int = 0) -> bool:
        return self.processes[rank].exitcode is not None

    def pid(self, rank: int) -> int:
        number = self.processes[rank].pid
        assert number is not None
        return number

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            assert process.pid is not None
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def kill(self, rank: int | None = None) -> None:
        self.signal(signal.SIGKILL, rank)

    def until(self, there: Callable[[], bool], timeout: float = 120) -> bool:
        """Return True as soon as `there()`; False when all ranks have ended before, or late."""
        end = time.monotonic() + timeout
        while not there():
            if all(p.exitcode is not None for p in self.processes) or time.monotonic() > end:
                return False
            time.sleep(TICK)
        return True

    def wait(self, timeout: float = 120, *, patient: bool = True) -> Finished:
        """Wait for the end of all ranks.

        When one fails, the others are ended as launcher.py does it: by SIGTERM after a second; by
        kill -9 at once unless `patient`. Raises Lost, with their output, when a rank is left after
        `timeout` seconds, or 30 seconds after SIGTERM, or when a process outlives the rank that
        started it.
        """
        end, failed, asked = time.monotonic() + timeout, False, math.inf
        running = {process.sentinel: process for process in self.processes}
        while running and time.monotonic() < end and (patient or not failed):
            now = time.monotonic()
            if now >= asked:
                self.signal(signal.SIGTERM)
                asked = math.inf
            for sentinel in wait(list(running), timeout=max(0.0, min(end, asked) - now)):
                if running.pop(int(sentinel)).exitcode and not failed:
                    failed, asked = True, time.monotonic() + PATIENCE[0]
                    end = min(end, asked + PATIENCE[1])
        late = [self.processes.index(process) for process in running.values()]
        orphans = [] if late else self._orphans()
        self.end()
        finished = self.finished()
        if late and (patient or not failed):
            since = f"{PATIENCE[1]:g} s after SIGTERM" if failed else f"after {timeout:g} s"
            raise Lost(f"{self.name}: rank {late[0]} still runs {since}\n{finished.tail()}")
        if orphans:
            raise Lost(f"{self.name}: rank {orphans[0]} left a process\n{finished.tail()}")
        return finished

    def _orphans(self) -> list[int]:
        """Return the ranks whose session still has a process, two seconds after their end."""
        end = time.monotonic() + 2
        left = list(range(len(self.processes)))
        while left and time.monotonic() < end:
            left = [rank for rank in left if _alive(self.processes[rank].pid)]
            time.sleep(TICK if left else 0)
        return left

    def end(self) -> None:
        """Kill what is left of the ranks and of what they started."""
        for process in self.processes:
            assert process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def finished(self) -> Finished:
        """Return exit codes and output of ranks that have ended."""
        stdout, stderr = (
            "".join(
                output.with_suffix(kind).read_text(errors="replace", encoding="utf-8")
                for output in self.outputs
            )
            for kind in (".out", ".err")
        )
        codes = tuple(process.exitcode or 0 for process in self.processes)
        return Finished(codes, stdout, stderr)


def _alive(group: int | None) -> bool:
    """Return whether a process group has a process."""
    assert group is not None
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


@contextmanager
def world(
    script: Path,
    *arguments: str,
    ranks: int = 1,
    folder: Path = ROOT,
    env: Mapping[str, str] | None = None,
    before: Callable[[int], None] | None = None,
) -> Iterator[World]:
    """Start `script arguments…` on `ranks` processes in `folder`; at the end kill what is left.

    `before(rank)`, a function that pickle can name (or functools.partial of one), runs in each
    process before the script. Returns when all ranks have begun.
    """
    # where the ranks meet; it is made here, so its port cannot be taken in between
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / str(rank) for rank in range(ranks)]
        started = []
        for rank, output in enumerate(outputs):
            variables = world_variables(rank, ranks, store.port) if ranks > 1 else {}
            variables |= {"WANDB_MODE": "offline", **(env or {})}
            words = (script, arguments, folder, output, variables, before, rank)
            started.append(CONTEXT.Process(target=_run, args=words))
        for process in started:
            process.start()
        running = World(script.name, started, outputs)
        try:
            running.until(lambda: all(output.with_suffix(".err").exists() for output in outputs))
            yield running
        finally:
            running.end()


def run(script: Path, *arguments: str, timeout: float = 120, **more: object) -> Finished:
    """Run a script to its end, as `world` starts it. Raises Lost when it takes longer."""
    with world(script, *arguments, **more) as ranks:  # type: ignore[arg-type]
        return ranks.wait(timeout)


def _run(
    script: Path,
    arguments: tuple[str, ...],
    folder: Path,
    output: Path,
    variables: dict[str, str],
    before: Callable[[int], None] | None,
    rank: int,
) -> NoReturn:
    """Be the script, in a forked process."""
    os.setsid()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    for stream, kind in ((1, ".out"), (2, ".err")):
        file = os.open(output.with_suffix(kind), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    if before is not None:
        before(rank)
    runpy.run_path(str(script), run_name="__main__")
    sys.exit(0)
