from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import cpu_compat
from gipo_megatron.megatron import mesh as mesh_module
from gipo_megatron.megatron.mesh import Mesh, check_factors
from gipo_megatron.recipe.problems import Problem, RecipeErrors
from gipo_megatron.specs import Parallel


def test_a_world_that_does_not_factor_names_every_factor() -> None:
    with pytest.raises(UserError) as error:
        check_factors(Parallel(tensor=4, pipeline=2), 6)
    assert "tensor 4 × pipeline 2 × data ? ≠ world 6" in str(error.value)
    assert "multiple of 8" in str(error.value)


def test_sizes_that_make_no_grid() -> None:
    with pytest.raises(UserError, match="below 1"):
        check_factors(Parallel(tensor=0), 1)
    with pytest.raises(UserError, match=r"parallel\.pipeline above 1"):
        check_factors(Parallel(virtual_pipeline=2), 1)
    check_factors(Parallel(tensor=2, pipeline=2, virtual_pipeline=3), 8)


def test_one_plain_process(mesh: Mesh) -> None:
    assert (mesh.world, mesh.rank, mesh.tensor_size, mesh.pipeline_size) == (1, 0, 1, 1)
    assert mesh.is_first_stage and mesh.is_last_stage and mesh.is_main
    x = torch.arange(3)
    assert (
        mesh.data_parallel.sum(x) is x
        and mesh.data_parallel.max(x) is x
        and mesh.broadcast_from_last_stage(x) is x
    )
    mesh.barrier()
    assert mesh.gather("x") == ["x"] and mesh.replica == 0
    assert mesh.from_main(lambda: 3) == 3 and mesh.waiting_group is None
    with pytest.raises(UserError, match="why"):
        mesh.from_main(refuse)


def refuse() -> None:
    raise UserError("why")


def test_an_error_of_any_kind_can_be_sent_to_other_ranks() -> None:
    problem = Problem("key", "what", fix="fix")
    for error in (UserError("a", where="b", fix="c"), RecipeErrors("tiny", [problem])):
        sent = pickle.loads(pickle.dumps(error))
        assert (type(sent), str(sent)) == (type(error), str(error)) and sent.args == error.args


def test_a_broken_connection_is_no_fault_of_this_rank() -> None:
    """Gloo's text is one that a killed neighbour left."""
    gloo = (
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error"
        " [127.0.0.1]:24261: Connection reset by peer."
    )
    for error in (RuntimeError(gloo), dist.DistNetworkError("recvValue failed")):
        assert mesh_module.cut_off(error).startswith("the connection to another rank broke off")
    assert mesh_module.cut_off(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""


def test_the_world_must_fit_before_anything_is_built(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="world 1"):
        Mesh.create(Parallel(tensor=2))


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("name", ["cpu", "cuda:3"])
def test_the_process_group_is_bound_to_the_gpu(
    name: str, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple, dict[str, Any]]] = []
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **named: calls.append((args, named))
    )
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "8")
    else:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    device = torch.device(name)
    mesh_module._start(device, timeout=4.0)
    ((backend,), named) = calls.pop()
    expected = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    assert (backend, named.pop("device_id")) == expected and not calls
    assert named.pop("timeout").total_seconds() == 6.0
    assert named.keys() == (set() if launched else {"store", "rank", "world_size"})


def test_determinism_is_chosen_when_the_world_starts(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    monkeypatch.setattr(cpu_compat, "make_deterministic", lambda: chosen.append(True))
    Mesh.create(Parallel(), seed=1)
    assert chosen == []
    Mesh.create(Parallel(), seed=1, deterministic=True)
    assert chosen == [True]


@pytest.mark.multiprocess
def test_two_processes(model_cells: list[dict[str, Any]]) -> None:
    for rank, cells in enumerate(model_cells):
        assert cells["mesh/sum"] and cells["mesh/input_kept"]
        assert cells["mesh/max"] == [1, 0]
        assert cells["mesh/broadcast"] == [1]  # the last stage's rank
        assert cells["mesh/from_main"] == {"rank": 0}
        assert cells["mesh/refused"] == (
            "no such server\n  where: algorithm.rollout.url\n  fix:   start it"
        )
        assert cells["mesh/gather"] == [["replica", 0], ["replica", 1]]
        assert cells["mesh/patience"] >= 1  # days: no rollout takes longer
        assert cells["mesh/place"] == [rank, 2, 0, 0]
    assert len(model_cells) == 2
