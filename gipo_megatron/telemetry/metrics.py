"""Metrics of all replicas reduced to one row of numbers; seconds by phase; memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from gipo_megatron.metrics import Metric, Metrics, digest, merge_metrics
from gipo_megatron.roles import DataParallel

GIB = 2**30
EXTREMES = ("min", "max")


def reduce_metrics(metrics: Metrics, dp: DataParallel) -> dict[str, float]:
    """Return the numbers to log: one sum over the replicas for all metrics that add, one maximum
    for both extremes (min x = -max -x).

    Replicas compare names, kinds and sizes first (two numbers), because sums of different layouts
    would hang or mix metrics. NaNs in the extremes are counted with the sums, because back ends
    differ in the maximum of NaN.

    Raises AssertionError on every replica when their metrics differ, naming those of this replica
    that others lack.
    """
    _assert_same_layout(metrics, dp)
    if not metrics:
        return {}
    added = {name: m for name, m in metrics.items() if m.kind not in EXTREMES}
    extreme = {name: m for name, m in metrics.items() if m.kind in EXTREMES}
    signs = torch.tensor(
        [1.0 if m.kind == "max" else -1.0 for m in extreme.values()], dtype=torch.float64
    )
    bounds = _join([m.parts for m in extreme.values()])
    sums = _join([m.parts for m in added.values()] + [bounds.isnan().double()])
    signed = torch.where(bounds.isnan(), -torch.inf, bounds * signs.to(bounds.device))

    sums = dp.sum(sums).cpu()
    highest = dp.max(signed).cpu() if extreme else signed.cpu()
    highest = torch.where(sums[len(sums) - len(extreme) :] > 0, torch.nan, highest * signs)

    reduced: dict[str, Metric] = {}
    for (name, m), parts in zip(
        added.items(),
        sums.split([len(m.parts) for m in added.values()] + [len(extreme)]),
        strict=False,
    ):
        reduced[name] = Metric(m.kind, parts)
    for (name, m), value in zip(extreme.items(), highest, strict=True):
        reduced[name] = Metric(m.kind, value.reshape(1))
    return {name: reduced[name].result() for name in metrics}


def _join(parts: list[Tensor]) -> Tensor:
    """Return one float64 vector, on the accelerator if any part is on it."""
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    device = next((p.device for p in parts if p.device.type != "cpu"), parts[0].device)
    return torch.cat([p.double().to(device) for p in parts])


def _assert_same_layout(metrics: Metrics, dp: DataParallel) -> None:
    if dp.size == 1:
        return
    keys = {name: f"{name}|{m.kind}|{len(m.parts)}" for name, m in metrics.items()}
    mine = float(digest("\n".join(keys.values())))
    device = next(
        (m.parts.device for m in metrics.values() if m.parts.device.type != "cpu"),
        torch.device("cpu"),
    )
    high, low = dp.max(torch.tensor([mine, -mine], dtype=torch.float64, device=device)).tolist()
    if high == -low:
        return
    buckets = 4096
    present = torch.zeros(buckets, dtype=torch.float64, device=device)
    for key in keys.values():
        present[digest(key) % buckets] = 1.0
    total = dp.sum(present)
    lacking = [name for name, key in keys.items() if total[digest(key) % buckets] < dp.size]
    detail = (
        f"not all others have {', '.join(lacking)}"
        if lacking
        else "the others have more metrics, or another order"
    )
    raise AssertionError(
        f"replica {dp.rank} of {dp.size}: the replicas do not log the same metrics; {detail}"
    )


class PhaseTimer:
    """Seconds of a step by phase, and the padding of its passes. A phase inside another stops the
    outer one's clock, so that the sum of the phases is the step.

    `on_change` gets a phase's name when it begins and, when it ends, the outer phase's name or "".
    """

    def __init__(
        self,
        on_change: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._on_change = on_change
        self._clock = clock
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._padding: Metrics = {}
        self._began = self._mark = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        self._on_change(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()
            self._on_change(self._open[-1] if self._open else "")

    def count(self, role: str, kind: str, real: int, whole: int) -> None:
        """Add a pass (forward | update) of a model over `whole` tokens, padding and `real` ones."""
        share = Metric.ratio(float(whole - real), float(whole))
        names = ("perf/padding", f"perf/padding/{role}_{kind}")
        self._padding = merge_metrics(self._padding, dict.fromkeys(names, share))

    def metrics(self) -> Metrics:
        """Return {time/step_seconds, time/<phase>} since the last call, of the slowest replica, and
        {perf/padding, perf/padding/<pass>}; start the next step's clocks and counts."""
        self._switch()
        now = self._clock()
        seconds = {"step_seconds": now - self._began, **self._seconds}
        padding = self._padding
        self._seconds, self._padding, self._began = {}, {}, now
        times = {
            f"time/{name}": Metric.max(torch.tensor([value], dtype=torch.float64))
            for name, value in seconds.items()
        }
        return {**times, **padding}

    def _switch(self) -> None:
        """Add the time since the last switch to the innermost open phase."""
        if torch.cuda.is_initialized():
            # kernels are asynchronous: without this their time counts for the next phase
            torch.cuda.synchronize()
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


def memory_metrics() -> Metrics:
    """Return memory/peak_gib (highest accelerator memory since the last call, CUDA only) and
    memory/host_rss_gib (this process)."""
    rss = torch.tensor([psutil.Process().memory_info().rss / GIB])
    metrics = {"memory/host_rss_gib": Metric.max(rss)}
    if torch.cuda.is_initialized():
        metrics["memory/peak_gib"] = Metric.max(
            torch.tensor([torch.cuda.max_memory_allocated() / GIB])
        )
        torch.cuda.reset_peak_memory_stats()
    return metrics
