"""What the planner says a step needs, and what it needed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gipo_megatron.capabilities import fp8_obstacle, probe
from gipo_megatron.megatron.mesh import Mesh
from tools.benchmark_gpu import Step, measure_step, predicted_gib

STEP = Step(layers=4, rows=8, micro_batch=4, length=2048)


@pytest.mark.parametrize("fp8", ["none", "tensorwise"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_within_ten_percent(mesh: Mesh, recompute: str, fp8: str) -> None:
    if fp8 != "none" and (obstacle := fp8_obstacle(fp8, probe())):
        pytest.skip(obstacle)
    step = replace(STEP, recompute=recompute)
    measured, predicted = measure_step(mesh, step, fp8, repeats=2).peak_gib, predicted_gib(step, fp8)
    print(json.dumps({"recompute": recompute, "fp8": fp8, "measured GiB": measured, "predicted GiB": predicted}))
    assert predicted == pytest.approx(measured, rel=0.1)
