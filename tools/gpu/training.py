"""Parts `mfu` and `profile`: what a bf16 training step costs, as a slope over layers, and where its
time goes.

A few layers are no measure of a whole model: the output layer and the readout weigh too much. So a
step is timed with 2 and with 8 layers; the difference is six layers' time, and a model of N layers
takes  t(2) + (N - 2) · (t(8) - t(2)) / 6.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from gipo_megatron.megatron.roles import MegatronActor
from gipo_megatron.specs import Precision
from gipo_megatron.types import Sequences, TokenStats
from tools.gpu.bench import STALE, Bench, Figure, NotRun, equal, figure, within
from tools.gpu.models import (
    SEVEN_B,
    Step,
    new_actor,
    peak_flops,
    random_text,
    supervised,
    trained_actor,
)
from tools.gpu.plans import LAYERS, SLOPES, fingerprint, step

AIM = {"7B": 0.50}  # MFU of the whole model
TERA = 1e12


@dataclass(frozen=True)
class Timed:
    seconds: float  # median
    peak_gib: float


@dataclass(frozen=True)
class Slope:
    """Two steps that differ in layers alone."""

    few: Step
    many: Step
    seconds: tuple[float, float]

    @property
    def layer(self) -> float:
        """Seconds."""
        return (self.seconds[1] - self.seconds[0]) / (
            self.many.architecture.num_layers - self.few.architecture.num_layers
        )

    @property
    def fixed(self) -> float:
        """Seconds that do not depend on the layers."""
        return self.seconds[0] - self.few.architecture.num_layers * self.layer

    def flops_per_second(self, num_layers: int) -> float:
        """Of a model of that many layers."""
        whole = replace(
            self.few, architecture=replace(self.few.architecture, num_layers=num_layers)
        )
        return whole.flops / (self.fixed + num_layers * self.layer)

    @property
    def layer_flops(self) -> float:
        return (self.many.flops - self.few.flops) / (
            self.many.architecture.num_layers - self.few.architecture.num_layers
        )


def timed(bench: Bench, one: Step, repeats: int = 5, unmeasured: int = 3) -> Timed:
    """The optimizer's state and the allocator's blocks are made in the unmeasured steps. The model
    is gone afterwards."""
    bench.empty()
    found = _timed(bench, trained_actor(bench.mesh, one), random_text(one), repeats, unmeasured)
    bench.empty()
    return found


def _timed(
    bench: Bench, actor: MegatronActor, rows: Sequences, repeats: int, unmeasured: int
) -> Timed:
    bench.each(lambda: actor.update((rows, supervised)), 1 if bench.tiny else unmeasured)
    with bench.peak() as peak:
        times = bench.each(lambda: actor.update((rows, supervised)), 1 if bench.tiny else repeats)
        return Timed(statistics.median(times), peak())


def mfu(bench: Bench) -> Iterator[Figure]:
    for name, whole in SLOPES.items():
        steps = [step(whole, bench.tiny, layers) for layers in LAYERS]
        found = [timed(bench, one) for one in steps]
        yield from shown(
            bench,
            name,
            Slope(steps[0], steps[1], (found[0].seconds, found[1].seconds)),
            whole.num_layers,
        )
        for layers, measured in zip(LAYERS, found, strict=True):
            yield planned(bench, f"{name}, {layers} layers", measured.peak_gib)


def planned(bench: Bench, name: str, peak_gib: float) -> Figure:
    """A peak against the planner's (golden.json); on a CPU, where none is measured, the planner's
    alone."""
    plans = bench.golden["plans"]
    if plans["cases"] != fingerprint():
        raise NotRun(STALE)
    expected = plans["tiny" if bench.tiny else "full"].get(name)
    if expected is None:
        return figure(f"{name}: peak GiB", peak_gib, "the planner has no such phase")
    if not bench.cuda:
        return figure(f"{name}: planned GiB", expected)
    if bench.tiny:  # the allocator's blocks of 512 bytes weigh as much as the tensors
        return figure(f"{name}: peak GiB", peak_gib, f"planned {expected:.4g}")
    return within(f"{name}: peak GiB, planned", peak_gib, expected, 0.1)


def shown(bench: Bench, name: str, slope: Slope, num_layers: int) -> Iterator[Figure]:
    tokens = slope.few.rows * slope.few.length
    whole = slope.fixed + num_layers * slope.layer
    yield figure(f"{name}: ms a layer", 1000 * slope.layer)
    yield figure(f"{name}: ms beside the layers", 1000 * slope.fixed)
    yield figure(f"{name}: TFLOP/s of a layer", slope.layer_flops / slope.layer / TERA)
    yield figure(f"{name}: tokens/s of {num_layers} layers", tokens / whole)
    peak = peak_flops()
    if peak is None:
        yield figure(
            f"{name}: TFLOP/s of {num_layers} layers", slope.flops_per_second(num_layers) / TERA
        )
        return
    value = slope.flops_per_second(num_layers) / peak
    label = f"{name}: MFU of {num_layers} layers (bf16 peak)"
    yield bench.fast(label, value, AIM[name]) if name in AIM else figure(label, value)


# ------------------------------------------------------------------------------------------ profile


def profile(bench: Bench) -> Iterator[Figure]:
    """One step of 8 layers under torch's profiler, in profile.txt."""
    one = step(SEVEN_B, bench.tiny, LAYERS[1])
    actor, rows = trained_actor(bench.mesh, one), random_text(one)
    seconds = bench.seconds(lambda: actor.update((rows, supervised)), 2, 2)
    yield figure("step, ms", 1000 * seconds)
    readout = readout_seconds(bench, actor, rows)
    yield figure("share of the head in a step, forward and backward", readout / seconds)
    with profiler(bench) as found:
        actor.update((rows, supervised))
        bench.sync()
    order = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=90)
    (bench.out / "profile.txt").write_text(table, encoding="utf-8")
    kernels = device_times(found)
    yield figure("kernels of a step", len(kernels))
    if kernels:
        yield figure("share of the step in which no kernel runs", idle_share(kernels))
    yield equal("aten::bmm in a forward pass of one row (F14)", products_of_one_row(bench, one), 0)


def profiler(bench: Bench) -> Any:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    return torch.profiler.profile(activities=activities)


def device_times(found: Any) -> list[tuple[float, float]]:
    """Start and end of all that ran on the GPU, in microseconds; a named range is no work of its
    own."""
    events = [
        e
        for e in found.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    return [(e.time_range.start, e.time_range.end) for e in events]


def idle_share(kernels: list[tuple[float, float]]) -> float:
    """Of the time from the first kernel's start to the last one's end."""
    kernels = sorted(kernels)
    busy, reached = 0.0, kernels[0][0]
    for start, end in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - kernels[0][0])


def readout_seconds(bench: Bench, actor: MegatronActor, rows: Sequences) -> float:
    """Of one step: its own wall time between two waits for the device, from hidden states to
    log-probs and back."""
    clock = Stopwatch(bench)

    def read(raw: torch.Tensor, *rest: Any) -> Any:
        clock.start()
        output = actor.readout(raw, *rest)
        clock.stop()
        assert isinstance(output, TokenStats)
        output.logprobs.register_hook(lambda gradient: clock.start())
        raw.register_hook(lambda gradient: clock.stop())
        return output

    actor.engine.update([(rows, supervised)], read)
    return clock.total


@dataclass
class Stopwatch:
    bench: Bench
    total: float = 0.0
    _began: float = 0.0

    def start(self) -> None:
        self._began = self.bench.now()

    def stop(self) -> None:
        self.total += self.bench.now() - self._began


def products_of_one_row(bench: Bench, one: Step) -> int:
    """aten::bmm calls when one row is read: torch 2.11 multiplies [s, 1, h] as s products of one
    row each if its strides are odd."""
    single = replace(
        one, rows=1, micro_batch=1, architecture=replace(one.architecture, num_layers=2)
    )
    actor = new_actor(bench.mesh, single.architecture, Precision("bf16"))
    with profiler(bench) as found:
        actor.logprobs(random_text(single))
        bench.sync()
    return sum(event.count for event in found.key_averages() if event.key == "aten::bmm")
