"""Growth of the cost of a training step: python tools/benchmark.py growth [--out FILE.svg]

SFT steps of a small model on one batch, one size changed at a time; every token but the first is in
the loss. Seconds, and the growth of memory over what the imports take, each point in a new process.
The exponent p of cost ∝ size^p is fitted by least squares in logarithms, on all points and on the
largest two.
"""

from __future__ import annotations

import math
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from gipo_megatron.files import write_bytes
from gipo_megatron.reports.figures import rendered
from gipo_megatron.reports.style import colour, marker, panels, shared_legend, style
from gipo_megatron.specs import Architecture
from tools.benchmark_common import markdown
from tools.benchmark_peers import Side, prepare
from tools.benchmark_peers_rows import Cell, Model
from tools.benchmark_worker import MIB, Worker

BASE = {"vocabulary": 4096, "length": 128, "batch": 8, "layers": 4}
SIZES = {
    "vocabulary": (4096, 16384, 49152, 151936),
    "length": (128, 256, 512, 1024, 2048),
    "batch": (1, 2, 4, 8, 16, 32),
    "layers": (2, 4, 8, 16),
}
TINY = {"vocabulary": (512, 1024), "length": (16, 32), "batch": (1, 2), "layers": (1, 2)}


@dataclass(frozen=True)
class Point:
    """The cost of a step at one size."""

    size: int
    seconds: float  # median
    lowest: float
    highest: float
    peak: int  # bytes


def cell_of(sizes: dict[str, int]) -> Cell:
    architecture = Architecture(
        sizes["layers"], 256, 688, 8, 4, 32, sizes["vocabulary"], sizes["length"]
    )
    # lengths of an equal batch are half of the longest
    longest, rows = 2 * sizes["length"], sizes["batch"]
    name = " ".join(f"{name} {size}" for name, size in sizes.items())
    model = Model(name, architecture, rows, longest, micro_tokens=rows * longest)
    return Cell(model, "sft", equal=True)


def measure(cell: Cell, rounds: int) -> tuple[list[float], int]:
    """Return the seconds of `rounds` steps after one for warming up, and the peak in bytes."""
    worker = Worker(Side, "ours", cell, "")
    worker.ready()
    seconds = [worker("step", number)[0] for number in range(rounds + 1)][1:]
    peak = worker("grown")
    worker.close()
    return seconds, peak


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return p of the least squares line log cost = p log size + c."""
    slope, _ = np.polyfit(np.log(sizes), np.log(costs), 1)
    return float(slope)


def draw(curves: dict[str, list[Point]]) -> Figure:
    """One panel per size: seconds and memory relative to the smallest point, both axes
    logarithmic."""
    with style():
        figure, axes = panels(list(curves), columns=2)
        for axis, points in zip(axes, curves.values(), strict=True):
            sizes = [point.size for point in points]
            costs = {
                "seconds": [point.seconds for point in points],
                "memory": [point.peak for point in points],
            }
            for i, (label, values) in enumerate(costs.items()):
                relative = [value / values[0] for value in values]
                axis.plot(sizes, relative, marker=marker(i), color=colour(i), label=label)
                axis.annotate(
                    f"{exponent(sizes[-2:], values[-2:]):.2f}",
                    (sizes[-1], relative[-1]),
                    (-4, 5),
                    textcoords="offset points",
                    ha="right",
                    color=colour(i),
                )
            straight = [size / sizes[0] for size in sizes]
            axis.plot(sizes, straight, ":", color="#666666", label="in proportion", zorder=0)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.xaxis.set_major_locator(FixedLocator(sizes))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xticklabels([f"{size:,}" for size in sizes])
            powers = range(math.ceil(math.log2(straight[-1])) + 1)
            axis.yaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
            axis.set_yticklabels([f"{2**power}×" for power in powers])
        shared_legend(figure, axes)
    return figure


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="an svg file for the figure")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the command")


def run_growth(options: Namespace) -> None:
    prepare(options.threads)
    base = {name: sizes[0] for name, sizes in TINY.items()} if options.tiny else BASE
    curves: dict[str, list[Point]] = {}
    for name, sizes in (TINY if options.tiny else SIZES).items():
        curves[name] = []
        for size in sizes:
            seconds, peak = measure(cell_of(base | {name: size}), options.rounds)
            median = statistics.median(seconds)
            curves[name].append(Point(size, median, min(seconds), max(seconds), peak))
    rest = ", ".join(f"{name} {size}" for name, size in base.items())
    print(
        f"hidden 256, {rest}, fp32, where not varied; {options.threads} threads;"
        f" {options.rounds} steps\n"
    )
    show(curves)
    if options.out:
        write_bytes(Path(options.out), rendered(draw(curves), "svg"))


def show(curves: dict[str, list[Point]]) -> None:
    table: list[list[object]] = [["", "size", "s / step (lowest to highest)", "peak MiB"]]
    fits: list[list[object]] = [["exponent of", "seconds", "largest two", "memory", "largest two"]]
    for name, points in curves.items():
        for point in points:
            spread = f"{point.seconds:.3f} ({point.lowest:.3f} to {point.highest:.3f})"
            table.append([name, f"{point.size:,}", spread, f"{point.peak / MIB:.0f}"])
        sizes = [point.size for point in points]
        costs = [[point.seconds for point in points], [point.peak for point in points]]
        fitted = [exponent(sizes[k:], values[k:]) for values in costs for k in (0, -2)]
        fits.append([name, *(f"{p:.2f}" for p in fitted)])
    markdown(table)
    print()
    markdown(fits)
