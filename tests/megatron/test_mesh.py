from __future__ import annotations

from typing import Any

import pytest
import torch

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.mesh import Mesh, check_factors
from gipo_megatron.specs import Parallel


def test_a_world_that_does_not_factor_names_every_factor() -> None:
    with pytest.raises(UserError) as error:
        check_factors(Parallel(tensor=4, pipeline=2), 6)
    assert "tensor 4 × pipeline 2 × data ? ≠ world 6" in str(error.value)
    assert "multiple of 8" in str(error.value)


def test_sizes_that_make_no_grid() -> None:
    with pytest.raises(UserError, match="below 1"):
        check_factors(Parallel(tensor=0), 1)
    with pytest.raises(UserError, match="virtual_pipeline 2 splits pipeline stages"):
        check_factors(Parallel(virtual_pipeline=2), 1)
    check_factors(Parallel(tensor=2, pipeline=2, virtual_pipeline=3), 8)


def test_one_plain_process(mesh: Mesh) -> None:
    assert (mesh.world, mesh.rank, mesh.tensor_size, mesh.pipeline_size) == (1, 0, 1, 1)
    assert mesh.is_first_stage and mesh.is_last_stage and mesh.is_main
    x = torch.arange(3)
    assert mesh.data_parallel.sum(x) is x and mesh.data_parallel.max(x) is x and mesh.broadcast_from_last_stage(x) is x
    mesh.barrier()


def test_the_world_must_fit_before_anything_is_built(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="world 1"):
        Mesh.create(Parallel(tensor=2))


@pytest.mark.multiprocess
def test_two_processes(model_cells: list[dict[str, Any]]) -> None:
    for rank, cells in enumerate(model_cells):
        assert cells["mesh/sum"] and cells["mesh/input_kept"]
        assert cells["mesh/max"] == [1, 0]
        assert cells["mesh/broadcast"] == [1]  # the last stage's rank
        assert cells["mesh/place"] == [rank, 2, 0, 0]
    assert len(model_cells) == 2
