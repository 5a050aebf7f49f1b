"""A 7B-shaped step's FLOP utilisation: printed for docs/results.md, and a floor that only something broken falls below."""

from __future__ import annotations

import json

import pytest

from gipo_megatron.capabilities import fp8_obstacle, probe
from gipo_megatron.megatron.mesh import Mesh
from tools.benchmark_gpu import Step, measure_step

FLOOR = 0.2  # of dense bf16 peak; an fp32 product, a loop on the host or a copy a layer costs more than half of what is usual


@pytest.mark.parametrize("fp8", ["none", "tensorwise", "blockwise", "delayed"])
def test_utilisation(mesh: Mesh, fp8: str) -> None:
    if fp8 != "none" and (obstacle := fp8_obstacle(fp8, probe())):
        pytest.skip(obstacle)
    found = measure_step(mesh, Step(), fp8)
    if found.mfu is None:
        pytest.skip("the peak rate of this device is not in telemetry/performance.py")
    print(json.dumps({"fp8": fp8, **vars(found)}))
    assert found.mfu > FLOOR
