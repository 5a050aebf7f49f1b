"""One mesh of one process, and the results of the two-process checks, for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel
from tests.parity.launch import ranks


@pytest.fixture(scope="session")
def mesh() -> Iterator[Mesh]:
    """One process without torchrun."""
    yield Mesh.create(Parallel(), seed=1)


@pytest.fixture(scope="session")
def model_cells(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found (tests/parity/model_cases.py)."""
    return [found["model"] for found in ranks(2, tmp_path_factory)[1]]
