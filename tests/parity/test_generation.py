"""Generation at every layout: greedy responses are Hugging Face's, sampled ones are those of one
process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel
from tests.parity import families
from tests.parity.generate_cases import LAYOUTS, NUM_FAMILIES
from tests.parity.generation_cases import (
    FULL,
    NEVER,
    SAMPLINGS,
    cases,
    end_ids,
    hf_greedy,
    load,
    prompts,
    respond,
    responses,
)
from tests.parity.launch import ranks

Cell = dict[str, Any]


@pytest.fixture(scope="module")
def expected() -> dict[str, Cell]:
    """Greedy: Hugging Face. Sampled: one process, whose arithmetic tests/megatron/test_generate.py
    holds against Hugging Face."""
    mesh, cells, ends = Mesh.create(Parallel(), seed=1), {}, end_ids()
    for name in families.FAMILIES:
        reference, (chunks, architecture) = families.hf_model(name), load(name, mesh)
        for kind, run in cases(name):
            rows, eos = prompts(kind), ends[f"{name}/{kind}"]
            if run in SAMPLINGS:
                rollout = respond(chunks, architecture, mesh, rows, SAMPLINGS[run], eos)
                assert rollout.generation_logprobs is not None
                logprobs = [
                    row[mask].tolist()
                    for row, mask in zip(rollout.generation_logprobs, rollout.mask, strict=True)
                ]
                cells[f"{name}/{kind}/{run}"] = {
                    "responses": responses(rollout),
                    "logprobs": logprobs,
                }
            else:
                cells[f"{name}/{kind}/{run}"] = {
                    "responses": hf_greedy(reference, rows, eos if run == "stopped" else None)
                }
    assert NEVER not in ends.values()
    return cells


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [2, 4])
def test_responses_at_every_layout(
    world: int, tmp_path_factory: pytest.TempPathFactory, expected: dict[str, Cell]
) -> None:
    checked = sliced = 0
    for found in ranks(world, tmp_path_factory)[1]:
        for key, cell in found["generation"].items():
            if key.endswith("/room"):
                continue
            want = expected[key.split("/", 1)[1]]
            replica, size = cell["replica"]
            assert cell["same_on_replica"], key
            assert cell["responses"] == want["responses"][replica::size], key
            if "sliced" in cell:
                assert cell["sliced"] == cell["responses"], key
                sliced += 1
            if "logprobs" in want:
                flat = [x for row in want["logprobs"][replica::size] for x in row]
                found = [x for row in cell["logprobs"] for x in row]
                torch.testing.assert_close(
                    torch.tensor(found), torch.tensor(flat), atol=2e-5, rtol=0
                )
            checked += 1
    ran = list(families.FAMILIES)[: NUM_FAMILIES[world]]
    assert FULL in ran and checked == world * len(LAYOUTS[world]) * sum(
        len(cases(name)) for name in ran
    )
    assert sliced == world * len(LAYOUTS[world]) * 4


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_of_a_replica_agree_on_the_least_free_memory(
    world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checked = 0
    for found in ranks(world, tmp_path_factory)[1]:
        for layout in LAYOUTS[world]:
            cell = found["generation"][f"{layout}/room"]
            assert cell["alone"] == sorted(set(cell["alone"])) and cell["alone"][0] > 0
            assert cell["agreed"] == cell["alone"][min(cell["ranks"])], layout
            checked += 1
    assert checked == world * len(LAYOUTS[world])
