"""Runs of the trainer that start from each other's weights, several at once.

Each is `gipo train` in a process forked from one that has imported torch and Megatron: a start
costs a tenth of a second, a fresh Python seven.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType

from gipo_megatron import cli, environment

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    "gipo_megatron.training.runner", "gipo_megatron.algorithms.ppo",
    "gipo_megatron.reports.run_report", "tools.study",
]  # fmt: skip
Process = multiprocessing.context.ForkServerProcess


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str
    folder: Path
    words: tuple[str, ...]  # of `gipo train`, without run.dir
    needs: tuple[Path, ...] = ()  # run folders that must be complete before it starts

    @property
    def complete(self) -> bool:
        return is_complete(self.folder)

    @property
    def ready(self) -> bool:
        return all(map(is_complete, self.needs))


def is_complete(folder: Path) -> bool:
    return (folder / "final").exists()


def run_all(jobs: Sequence[Job], workers: int, ended: Callable[[Job], None]) -> list[Job]:
    """Run all jobs, at most `workers` at once, always the first that is ready; call `ended` after
    each that is complete. Return those that failed, or needed one that failed.

    Ctrl-C and SIGTERM end the runs after their step, with a checkpoint from which the next start
    continues, and raise KeyboardInterrupt.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    environment.set_defaults()
    CONTEXT.set_forkserver_preload(PRELOAD)
    waiting, failed = list(jobs), list[Job]()
    running: dict[Job, Process] = {}
    with _interrupted_by_sigterm():
        try:
            while True:
                ready = [job for job in waiting if job.ready]
                for job in ready[: workers - len(running)]:
                    waiting.remove(job)
                    running[job] = _start(job)
                if not running:
                    return failed + waiting
                wait([process.sentinel for process in running.values()])
                for job in [job for job, process in running.items() if not process.is_alive()]:
                    code = running.pop(job).exitcode
                    if code == 0 and job.complete:
                        ended(job)
                    else:
                        print(f"{job.name}: exit code {code}; see {_log(job)}", file=sys.stderr)
                        failed.append(job)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.join()


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log(job: Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.log")


def _start(job: Job) -> Process:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    words = ["train", *job.words, f"run.dir={job.folder}"]
    process = CONTEXT.Process(target=_train, args=(_log(job), words))
    process.start()
    return process


def _train(log: Path, words: Sequence[str]) -> None:
    """Be `gipo`, in a forked process, with the log for a screen."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(cli.main(words))
