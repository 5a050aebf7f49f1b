"""Training at every layout against plain autograd over Hugging Face's model: gradients, skipped steps, residency, checkpoints.

Every world size is started once (train_worker.py); the tests read what its ranks wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel
from tests.parity.launch import run_workers
from tests.parity.train_worker import LAYOUTS, MICRO_BATCHES, digest, new_actor, new_critic, train

pytestmark = [pytest.mark.multiprocess, pytest.mark.global_rng]
KINDS = {"actor": 39, "critic": 41, "reward": 39}  # tensors that have a gradient, heads included
WORLDS = (1, 2)


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_workers("train_worker.py", request.param, tmp_path_factory.mktemp(f"train{request.param}"), timeout=500)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The checkpoint part of the two-process run."""
    out = tmp_path_factory.mktemp("checkpoints2")
    return out, run_workers("train_worker.py", 2, out, "checkpoints", timeout=500)


def test_gradients(ranks: list[dict[str, Any]]) -> None:
    layouts = LAYOUTS[len(ranks)]
    expected = {f"{layout}/{kind}/{micro}" for layout in layouts for kind in KINDS for micro in MICRO_BATCHES}
    assert len(expected) == {1: 9, 2: 45}[len(ranks)]
    for rank, result in enumerate(ranks):
        assert result["cells"].keys() == expected
        for cell, errors in result["cells"].items():
            layout, kind, _ = cell.split("/")
            first_stage_of_two = layouts[layout].pipeline == 2 and rank == 0
            assert len(errors) == (39 if first_stage_of_two else KINDS[kind]), cell  # the group head lives on the last stage
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] <= 1e-5, f"rank {rank} {cell}: {worst} {errors[worst]:.2e}"


def test_two_updates_do_not_depend_on_the_layout(ranks: list[dict[str, Any]]) -> None:
    reference = ranks[0]["steps"][next(iter(LAYOUTS[len(ranks)]))]
    for result in ranks:
        assert result["steps"].keys() == LAYOUTS[len(ranks)].keys()
        for layout, seen in result["steps"].items():
            assert seen.keys() == reference.keys() and len(seen) == 5
            for name, values in seen.items():
                assert values == pytest.approx(reference[name], rel=1e-4), (layout, name)
            assert [seen["actor/0"][1], seen["actor/1"][1]] == [0.0005, 0.001]


def test_a_bad_loss_or_gradient_skips_the_step_everywhere(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert len(result["skipping"]) == len(LAYOUTS[len(ranks)])
        for layout, seen in result["skipping"].items():
            # row 3 is named by every rank, also by those whose own rows are well
            assert seen == {"named": [3], "every": list(range(8)), "unmoved": True, "same_next": True}, layout


def test_an_observing_group_head_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    assert all(set(result["observing"].values()) == {True} for result in ranks)


def test_residency_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        for layout, seen in result["residency"].items():
            assert seen["same"] == [True, True] and seen["reference_same"] == [True, True], layout
            assert seen["reference_differs_from_actor"], layout
            assert seen["parked_bytes"] == [0, 0], layout


def test_resume_at_the_same_layout_is_bit_identical(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in two[1]:
        seen = result["checkpoints"]
        assert seen.keys() == {"uninterrupted", *LAYOUTS[2]}
        first = next(iter(LAYOUTS[2]))
        assert seen[first]["norms"] == seen["uninterrupted"]["norms"] and len(seen[first]["norms"]) == 4
        assert seen[first]["digests"] == seen["uninterrupted"]["digests"]
        assert seen[first]["steps"] == [3, 3]


def test_resume_at_another_layout(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in two[1]:
        expected = result["checkpoints"]["uninterrupted"]["norms"]
        for layout in LAYOUTS[2]:
            assert result["checkpoints"][layout]["norms"] == pytest.approx(expected, rel=1e-4), layout


def test_resume_in_one_process(two: tuple[Path, list[dict[str, Any]]]) -> None:
    mesh = Mesh.create(Parallel())
    roles = {"actor": new_actor(mesh), "critic": new_critic(mesh)}
    state = checkpoint.restore(two[0] / "checkpoints" / "step_3", {k: r.engine for k, r in roles.items()}, mesh)
    assert state["position"] == 3 and torch.equal(state["generator"], torch.Generator().manual_seed(1).get_state())
    assert train(roles, mesh, 2) == pytest.approx(two[1][0]["checkpoints"]["uninterrupted"]["norms"], rel=1e-4)
    assert len(digest(roles["actor"])) == 64
