"""Shared by all tests: one thread, and nobody draws from a global random generator."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sklearn.metrics  # noqa: F401  (its import draws from `random`; ours is in a function)
import torch
from xdist.scheduler import LoadScopeScheduling

from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.specs import Parallel

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "global_rng: may consume the global random generators (Hugging Face models, mcore's"
        " seeding)",
    )


# Groups of tests that share one worker of pytest-xdist, and so the processes and models of their
# fixtures; the longest first. The first that fits counts; any other file is a group.
GROUPS = {
    "smollm": ("tests/runs/test_smollm.py",),
    "runs": ("tests/runs/",),
    "worlds": (
        "tests/parity/",
        "tests/megatron/",
        "tests/conversion/",
        "tests/planning/test_reality.py",
    ),
    "planning": ("tests/planning/",),
}


def group(nodeid: str) -> str:
    """Return the name of a test's group."""
    names = (name for name, starts in GROUPS.items() if nodeid.startswith(starts))
    return next(names, nodeid.partition("::")[0])


class Groups(LoadScopeScheduling):
    """Give each worker of pytest-xdist whole groups."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups:
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = list(GROUPS)
    items.sort(key=lambda item: [*order, group(item.nodeid)].index(group(item.nodeid)))


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


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One process without torchrun."""
    yield Mesh.create(Parallel(), seed=1)
