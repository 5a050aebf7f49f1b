"""Tests that need a CUDA device: `pytest tests/gpu` on such a machine; elsewhere each is skipped
with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools.gpu.bench import Bench
from tools.gpu_verify import GOLDEN_LIMIT, make_golden


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder: marked gpu, not failed by warnings (they are other packages'),
    skipped where there is no GPU."""
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.global_rng)
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(
                    pytest.mark.skip(reason=f"no CUDA device (torch {torch.__version__})")
                )


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One process on one GPU, full sizes. GPU_VERIFY_DATA: what tools/gpu_verify.py takes as
    --data."""
    data, scratch = os.environ.get("GPU_VERIFY_DATA"), tmp_path_factory.mktemp("scratch")
    folder = Path(data) if data else None
    if folder is None or not (folder / "golden.json").is_file():
        assert make_golden(scratch / "golden.json", GOLDEN_LIMIT)
    yield Bench("cuda", False, folder, tmp_path_factory.mktemp("out"), scratch)
