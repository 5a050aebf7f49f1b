"""tokens/s of the own decoder with adapters beside the weights (two small products more per linear
layer), over those with the adapters merged into a copy of the weights; and the seconds of a merge.

New adapters add nothing (B is 0), so the merged weights are the model's own and both sides give the
same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gipo_megatron.megatron.adapters import adapters_of
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.generate import generate
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.param_sharding import linears
from gipo_megatron.specs import AdapterSpec, Parallel, Precision, Sampling
from gipo_megatron.weights.hf_config import architecture_from_hf
from tools.benchmark_common import interleave, ratio, show
from tools.benchmark_generate import PAD, Load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smollm", required=True, help="folder from tools/fetch_smollm.py")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    for name, default in (("--prompt", 32), ("--response", 32), ("--repeats", 3)):
        parser.add_argument(name, type=int, default=default)


def run_adapters(options: argparse.Namespace) -> None:
    mesh = Mesh.create(Parallel(), seed=0)
    table: list[list[object]] = [
        ["rank", "rows", "merged tokens/s", "unmerged tokens/s", "unmerged / merged", "merge s"]
    ]
    merged = _engine(options, mesh, 0)
    for rank in options.ranks:
        unmerged = _engine(options, mesh, rank)
        seconds = merge_seconds(unmerged)
        for rows in options.rows:
            load = Load(rows, options.prompt, options.response, ragged=False)
            sides = {"merged": _side(merged, load), "unmerged": _side(unmerged, load)}
            times = interleave(sides, options.repeats)
            speeds = {s: rows * load.response / statistics.median(t) for s, t in times.items()}
            median, lowest, highest = ratio(times, "merged", "unmerged")
            table.append(
                [
                    rank,
                    rows,
                    *(f"{speeds[side]:.1f}" for side in sides),
                    f"{median:.3f} ({lowest:.3f} to {highest:.3f})",
                    f"{seconds:.2f}",
                ]
            )
    print(
        f"{options.dtype}, prompts of {options.prompt} tokens, responses of {options.response};"
        f" {options.repeats} rounds"
    )
    show(table)
    mesh.close()


def _engine(options: argparse.Namespace, mesh: Mesh, rank: int) -> Engine:
    architecture = architecture_from_hf(Path(options.smollm))
    adapter = AdapterSpec(rank=rank)
    precision = Precision(options.dtype)
    return build_engine(
        "actor", mesh, architecture, precision, load=options.smollm, adapter=adapter
    )


def _side(engine: Engine, load: Load) -> Callable[[], object]:
    """Return a call that responds to the load's prompts; nothing ends a response early."""
    prompts = load.prompts(engine.architecture.vocab_size)
    sampling, place = Sampling(load.response), (engine.chunks, engine.architecture, engine.mesh)
    return lambda: generate(*place, prompts, sampling, [-1], PAD, lambda ids: "")


@torch.no_grad()
def merge_seconds(engine: Engine) -> float:
    """Return the time to compute all merged matrices once, one after the other."""
    start, found = time.perf_counter(), adapters_of(engine.chunks)
    for chunk in engine.chunks:
        for place, linear in linears(chunk):
            if place.name in found:
                found[place.name].merged(linear.weight)
    return time.perf_counter() - start
