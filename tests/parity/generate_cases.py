"""What ranks generate: the responses of every family at every layout, as plain lists; the test
compares them with Hugging Face's."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from gipo_megatron.megatron import kv_budget
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel, Sampling
from tests.parity import families
from tests.parity.generation_cases import (
    FULL,
    NEVER,
    cases,
    load,
    prompts,
    respond,
    responses,
    sampling_of,
)
from tests.parity.tiny import ARCHITECTURE

LAYOUTS = {
    2: {"data": Parallel(), **families.LAYOUTS},
    4: {
        "tensor_pipeline_sequence": Parallel(tensor=2, pipeline=2, sequence=True),
        "tensor_interleaved": Parallel(tensor=2, pipeline=2, virtual_pipeline=2),
        "pipeline_of_four": Parallel(pipeline=4),
        "pipeline_data": Parallel(pipeline=2),
    },
}
NUM_FAMILIES = {2: len(families.FAMILIES), 4: 1}


def check_layout(mesh: Mesh, name: str, ends: dict[str, int]) -> dict[str, Any]:
    """Responses of this replica's rows: sample j of the batch belongs to replica j mod size."""
    cells: dict[str, Any] = {}
    chunks, architecture = load(name, mesh)
    for kind, run in cases(name):
        whole = prompts(kind)
        rows = whole.select(
            torch.arange(mesh.data_parallel.rank, len(whole), mesh.data_parallel.size)
        )
        eos = NEVER if run == "greedy" else ends[f"{name}/{kind}"]
        rollout = respond(chunks, architecture, mesh, rows, sampling_of(run), eos)
        assert rollout.generation_logprobs is not None
        cells[f"{name}/{kind}/{run}"] = {
            "responses": responses(rollout),
            "logprobs": [
                row[mask].tolist()
                for row, mask in zip(rollout.generation_logprobs, rollout.mask, strict=True)
            ],
            "same_on_replica": same_on_replica(rollout.generation_logprobs, mesh),
        }
        if name == FULL and kind == "ragged":
            cells[f"{name}/{kind}/{run}"]["sliced"] = responses(
                respond(chunks, architecture, mesh, rows, sampling_of(run), eos, cache=10_000)
            )
    return cells


def same_on_replica(x: Tensor, mesh: Mesh) -> bool:
    first = x.clone()
    dist.broadcast(
        first, src=dist.get_process_group_ranks(mesh.model_group)[0], group=mesh.model_group
    )
    return torch.equal(first, x)


def check_room(mesh: Mesh) -> dict[str, Any]:
    """Rank r pretends to be a GPU with r + 1 of 16 MB free: the room of one rank alone, and what
    this replica agreed on."""
    need, sampling = kv_budget.Need(ARCHITECTURE, mesh.parallel, 2), Sampling(1)
    free = [(rank + 1) * 1_000_000 for rank in range(mesh.world)]
    with (
        patch.dict(kv_budget.PREFILL_TOKENS, cuda=8),
        patch.object(kv_budget, "free_memory", lambda device: (free[mesh.rank], 16_000_000)),
    ):
        alone = [kv_budget.room_in(x, 16_000_000, need, 8, sampling).size for x in free]
        return {
            "ranks": dist.get_process_group_ranks(mesh.model_group),
            "alone": alone,
            "agreed": kv_budget.find_room(mesh, need, 8, sampling).size,
        }


def run(world: int, ends: dict[str, int]) -> dict[str, Any]:
    """ends: {family/kind of prompts: end-of-text id}."""
    cells: dict[str, Any] = {}
    for layout, parallel in LAYOUTS[world].items():
        mesh = Mesh.create(parallel, seed=1)
        cells[f"{layout}/room"] = check_room(mesh)
        place = [mesh.data_parallel.rank, mesh.data_parallel.size]
        for name in list(families.FAMILIES)[: NUM_FAMILIES[world]]:
            cells |= {
                f"{layout}/{key}": {**cell, "replica": place}
                for key, cell in check_layout(mesh, name, ends).items()
            }
    return cells
