"""Tools of every part of gpu_verify.py: figures and their bounds, the device, time and memory."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gipo_megatron.megatron.mesh import Mesh

GIB = 2**30
STALE = "golden.json is of another version of this tool: make a new one with --golden FILE"


class NotRun(Exception):
    """A part cannot run here; the text is the reason, and what to do about it."""


@dataclass(frozen=True)
class Figure:
    """One line of the table. ok: None where there is no target."""

    name: str
    value: float | int | str | None  # None: not a number, or infinite
    target: str = ""
    ok: bool | None = None


def figure(name: str, value: float | str, target: str = "", ok: bool | None = None) -> Figure:
    """A number that is not finite is wrong for any target."""
    if isinstance(value, float) and not math.isfinite(value):
        return Figure(name, None, target or "finite", False)
    return Figure(name, value, target, ok)


def below(name: str, value: float, bound: float) -> Figure:
    return figure(name, value, f"< {bound:g}", value < bound)


def equal(name: str, value: float | str, expected: float | str) -> Figure:
    return figure(name, value, f"= {expected}", value == expected)


def true(name: str, ok: bool) -> Figure:
    return Figure(name, "yes" if ok else "no", "yes", ok)


def within(name: str, value: float, expected: float, share: float) -> Figure:
    """|value - expected| ≤ share · expected."""
    return figure(
        name, value, f"{expected:.4g} ± {share:.0%}", abs(value - expected) <= share * abs(expected)
    )


@dataclass
class Bench:
    """The device, the sizes, and the folders."""

    device: str  # cuda | cpu
    tiny: bool
    data: Path | None
    out: Path
    scratch: Path
    deadline: float = math.inf  # of the part, time.monotonic()'s
    used: float = 0.0  # GiB that stayed after the parts before
    # results of a part for a later one of the same process
    notes: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(settings: dict[str, Any]) -> Bench:
        data = Path(settings["data"]) if settings["data"] else None
        return Bench(
            settings["device"],
            settings["tiny"],
            data,
            Path(settings["out"]),
            Path(settings["scratch"]),
        )

    @cached_property
    def mesh(self) -> Mesh:
        """One process, made at first use: Megatron takes seconds to import."""
        from gipo_megatron.megatron.mesh import Mesh
        from gipo_megatron.specs import Parallel

        return Mesh.create(Parallel(), seed=0)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @cached_property
    def golden(self) -> dict[str, Any]:
        """golden.json, from --data or made for this run. Raises NotRun where there is none."""
        folders = [self.scratch] if self.data is None else [self.data, self.scratch]
        for folder in folders:
            if (folder / "golden.json").is_file():
                return json.loads((folder / "golden.json").read_text(encoding="utf-8"))
        raise NotRun(
            "no golden.json: python tools/gpu_verify.py --golden FILE, then --data its folder"
        )

    # ----------------------------------------------------------------------------------- speed

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.deadline - time.monotonic()

    def fast(self, name: str, value: float, at_least: float) -> Figure:
        """A speed. With --tiny, or on a CPU, it is shown and held to nothing."""
        held = self.cuda and not self.tiny
        return figure(name, value, f"≥ {at_least:g}", value >= at_least if held else None)

    def sync(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def now(self) -> float:
        """Seconds on a clock, when all that was started has ended."""
        self.sync()
        return time.perf_counter()

    def seconds(self, call: Callable[[], object], repeats: int = 5, unmeasured: int = 1) -> float:
        """Median of `repeats` calls, after some that warm up. With --tiny one of each: no speed is
        of interest."""
        repeats, unmeasured = (1, 1) if self.tiny else (repeats, unmeasured)
        return statistics.median(self.each(call, repeats, unmeasured))

    def each(self, call: Callable[[], object], repeats: int, unmeasured: int = 0) -> list[float]:
        """Seconds of each call, the device's work included."""
        times = []
        for repeat in range(unmeasured + repeats):
            start = self.now()
            call()
            if repeat >= unmeasured:
                times.append(self.now() - start)
        return times

    # ----------------------------------------------------------------------------------- memory

    def empty(self) -> None:
        """Give all unused memory back."""
        gc.collect()  # modules lie in cycles
        if self.cuda:
            import torch

            torch.cuda.empty_cache()

    @contextmanager
    def peak(self) -> Iterator[Callable[[], float]]:
        """Yields a function: GiB allocated at most since, over what other parts left behind. 0 on a
        CPU."""
        if not self.cuda:
            yield lambda: 0.0
            return
        import torch

        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() / GIB - self.used

    def free(self) -> Iterator[Figure]:
        """After a part: give its memory back. A figure where more than 0.1 GiB of it stays."""
        self.empty()
        if not self.cuda:
            return
        import torch

        rest, before = torch.cuda.memory_allocated() / GIB, self.used
        self.used = rest
        if rest - before > 0.1:
            yield figure("memory left behind, GiB", rest - before)
