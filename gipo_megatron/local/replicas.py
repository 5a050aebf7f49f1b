"""Data parallel replicas as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gipo_megatron.roles import DataParallel

R = TypeVar("R")


class ReplicaThread:
    """One replica's side of a group of threads; sums are in rank order, so they do not depend on
    timing."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def gather(self, value: Any, join: Callable[[list[Any]], Any] = list) -> Any:
        """Return all threads' values in rank order, joined before any thread goes on."""
        self._slots[self.rank] = value
        self._barrier.wait()
        everyone = join(self._slots)
        self._barrier.wait()
        return everyone

    def sum(self, x: Tensor) -> Tensor:
        return self.gather(x, torch.stack).sum(0)

    def max(self, x: Tensor) -> Tensor:
        return self.gather(x, torch.stack).amax(0)


def run_replicas(size: int, work: Callable[[DataParallel], R]) -> list[R]:
    """Run work(dp) on `size` threads that reduce with each other; return results in rank order.
    Raises the first error of a thread."""
    barrier, slots = threading.Barrier(size, timeout=60), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def target(rank: int) -> None:
        try:
            results[rank] = work(ReplicaThread(rank, size, barrier, slots))
        except BaseException as error:  # the other threads wait at the barrier
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results


def replica_rows(rows: Any, dp: DataParallel) -> Any:
    """Return this replica's share of global rows: global row i is row i // size of replica
    i % size."""
    return rows.select(torch.arange(dp.rank, len(rows), dp.size))
