"""Tests that need a CUDA device: `pytest tests/gpu` on such a machine; elsewhere each is skipped with the reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gipo_megatron.capabilities import fp8_obstacle, probe
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder: marked gpu, heard but not failed by warnings (they are other packages'), skipped where there is no GPU."""
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.global_rng)
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=f"no CUDA device (torch {torch.__version__})"))


@pytest.fixture(scope="session")
def mesh() -> Iterator[Mesh]:
    """One process on one GPU, without torchrun."""
    yield Mesh.create(Parallel(), seed=1)


@pytest.fixture
def transformer_engine() -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")


@pytest.fixture(params=["delayed", "tensorwise", "blockwise"])
def fp8(request: pytest.FixtureRequest) -> str:
    """Each FP8 recipe that can run here."""
    recipe: str = request.param
    if obstacle := fp8_obstacle(recipe, probe()):
        pytest.skip(obstacle)
    return recipe
