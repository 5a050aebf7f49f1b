"""Shared by all tests: one thread, and nobody draws from a global random generator."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group: tests that share a worker of pytest-xdist")
    config.addinivalue_line(
        "markers",
        "global_rng: may consume the global random generators (Hugging Face models, mcore's"
        " seeding)",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order and group the tests for pytest-xdist (`--dist loadgroup`): a group runs on one worker.

    Whole runs share a chain of models, multi-process tests the processes of a world size
    (tests/parity/launch.py), tests of the planner its plans, and any file its fixtures. The longest
    groups start first.
    """
    first = ["runs", "worlds", "planning"]
    for item in items:
        group = item.path.parent.name
        if hasattr(item.module, "ranks") or "model_cells" in item.fixturenames:
            group = "worlds"
        if group not in first:
            group = str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))

    def rank(item: pytest.Item) -> int:
        marker = item.get_closest_marker("xdist_group")
        assert marker is not None
        return first.index(marker.args[0]) if marker.args[0] in first else len(first)

    items.sort(key=rank)


def _states() -> dict[str, object]:
    """What each global generator would draw next."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "numpy": (kind, keys.tobytes(), position, has_gauss, gauss),
        "python": random.getstate(),
    }


@pytest.fixture(autouse=True)
def no_global_rng(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that consumed or seeded a global generator: every draw has its own
    (CONTRIBUTING.md). Opt out with `global_rng`."""
    if request.node.get_closest_marker("global_rng") is not None:
        yield
        return
    before = _states()
    yield
    moved = [name for name, state in _states().items() if state != before[name]]
    assert not moved, (
        f"global generator consumed: {', '.join(moved)}; give the draw its own generator, or mark"
        " the test global_rng"
    )


@pytest.fixture(scope="session")
def mesh() -> Iterator[Mesh]:
    """One process without torchrun."""
    yield Mesh.create(Parallel(), seed=1)
