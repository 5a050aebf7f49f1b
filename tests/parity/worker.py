"""Every multi-process check of this project's Megatron layer, in one start per world size.

worker.py OUT_DIR ENDS.json      writes OUT_DIR/rank_R.json (and checkpoints under OUT_DIR)
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gipo_megatron.megatron import cpu_compat
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel
from tests.conversion import families
from tests.parity import adapter_cases, generate_cases, model_cases, planning_cases, train_cases
from tests.parity.dpo_cases import dpo_cells
from tests.parity.launch import write_result
from tests.parity.matrix import BF16_CHECKPOINTS, GRADIENTS, LAYOUTS, MICRO_BATCHES
from tests.parity.ppo_cases import ppo_cells


def training(world: int) -> dict[str, Any]:
    names = ("ppo", "dpo", "cells", "steps", "skipping", "observing", "residency", "overlapping")
    result: dict[str, Any] = {name: {} for name in (*names, "budget")}
    for name, parallel in LAYOUTS[world].items():
        mesh = Mesh.create(parallel)
        result["ppo"] |= ppo_cells(mesh, name, MICRO_BATCHES[world])
        result["dpo"] |= dpo_cells(mesh, name, MICRO_BATCHES[world])
        result["cells"] |= {
            f"{name}/{variant}": train_cases.gradient_cell(mesh, variant, 2)
            for variant in GRADIENTS[world]
        }
        result["steps"][name] = train_cases.first_steps(mesh)
        result["budget"][name] = train_cases.budget(mesh)
        if mesh.data_parallel.size > 1:
            result["overlapping"][name] = train_cases.overlapping(mesh)
        if world <= 2:
            result["skipping"][name] = train_cases.skipping(mesh)
            result["observing"][name] = train_cases.observing(mesh)
            result["residency"][name] = train_cases.residency(mesh)
    return result


def checkpoints(world: int, out: Path) -> dict[str, Any]:
    """Saved at the first layout, resumed at every one; in bf16 at some."""
    result: dict[str, Any] = {}
    for name, parallel in LAYOUTS[world].items():
        mesh = Mesh.create(parallel)
        if not result:
            result["uninterrupted"] = train_cases.interrupted(mesh, out / "checkpoints")
            result["damaged"] = train_cases.damaged(mesh, out / "checkpoints")
        result[name] = train_cases.resumed(mesh, out / "checkpoints")
        if name in BF16_CHECKPOINTS:
            folder = out / f"bf16_{name}"
            result[f"bf16/{name}/uninterrupted"] = train_cases.interrupted(
                mesh, folder, precision=train_cases.BF16
            )
            result[f"bf16/{name}/resumed"] = train_cases.resumed(
                mesh, folder, precision=train_cases.BF16
            )
    return result


def jobs(world: int, out: Path, ends: dict[str, int]) -> dict[str, Callable[[], Any]]:
    every = {
        "training": partial(training, world),
        "adapters": partial(adapter_cases.run, world, out / "adapters"),
        "checkpoints": partial(checkpoints, world, out),
        "scaling": partial(train_cases.scaling, out / "scaling", LAYOUTS[world]),
        "model": partial(model_cases.run, out),
        "generation": partial(generate_cases.run, world, ends),
        "conversion": lambda: families.layout_checkpoints(
            out / "conversion", Mesh.create(Parallel())
        ),
        "allocated": partial(planning_cases.run, world),
    }
    return (
        every
        if world == 2
        else {name: every[name] for name in ("training", "generation", "allocated")}
    )


def main() -> None:
    torch.set_num_threads(1)
    out, ends = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    mesh = Mesh.create(Parallel())
    warnings.simplefilter("error")  # what a run would print
    # Python shows none of other people's modules
    warnings.simplefilter("ignore", DeprecationWarning)
    cpu_compat.silence()
    result: dict[str, Any] = {"seconds": {}}
    for job, run in jobs(mesh.world, out, ends).items():
        start = time.process_time()
        result[job] = run()
        result["seconds"][job] = time.process_time() - start
    write_result(out, mesh.rank, result)
    mesh.barrier()
    mesh.close()


if __name__ == "__main__":
    main()
