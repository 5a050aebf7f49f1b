"""What of `benchmark.py gpu` needs no GPU: its arithmetic, the planner behind it, and its refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import benchmark_gpu
from tools.benchmark_gpu import Step, predicted_gib


def test_flops_by_hand() -> None:
    """One layer, 2 rows of 8 tokens."""
    step = Step(layers=1, rows=2, length=8)
    h, f, v = 4096, 11008, 32000
    weights = 4 * h * h + 3 * h * f + v * h + 3 * h  # two norms in the layer, one at the end
    tokens = 2 * 8
    # causal: token t looks at t + 1 tokens, 4.5 on average; scores and values, 2 FLOP each; three times over; s / 2 instead of (s + 1) / 2
    attention = 3 * 2 * 2 * (8 / 2) * h
    assert step.flops == pytest.approx(6 * weights * tokens + attention * tokens, rel=1e-12)


def test_the_planner_knows_the_step() -> None:
    """Weights, gradients and three fp32 states of Adam are 2 + 4 + 12 bytes each; activations come on top, fewer when computed again."""
    step = Step(layers=2, rows=2, micro_batch=1, length=512)
    parameters = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    state = 18 * parameters / 2**30
    assert state < predicted_gib(step) < state + 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    command = [sys.executable, str(Path(benchmark_gpu.__file__).with_name("benchmark.py")), "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmark gpu: no CUDA device (tools/doctor.py says what there is)\n"
