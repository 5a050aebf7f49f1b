"""A whole run on a real vLLM server, which is killed in the second iteration.

    VLLM_PYTHON=…/bin/python pytest -m vllm -s tests/runs/test_vllm_real.py

It starts the server twice, on CPUs a minute or two each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.runs import chain
from tests.runs.test_vllm_run import left_over

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not os.environ.get("VLLM_PYTHON"), reason="needs VLLM_PYTHON, an interpreter with vLLM"
    ),
]
# a head's size that vLLM's kernels have; no compilation
SHAPE = ["model.architecture.head_dim=64", "models.actor.load=random", "models.reward.load=random"]
SERVE = {"name": "vllm", "serve": {"args": ["--enforce-eager"]}}


def test_a_killed_server_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    directory = tmp_path / "run"
    words = chain.ppo("gipo", directory, tmp_path, *SHAPE)
    words += [f"algorithm.rollout={json.dumps(SERVE)}", "run.eval_every=0"]
    with chain.running(words) as run:
        chain.wait_for(lambda: chain.logged(directory, 1), run, timeout=900)
        os.kill(engine(left_over(directory)), signal.SIGKILL)
        out, err = run.communicate(timeout=900)
    print(out, err)
    assert run.returncode == 0 and "restart 1 of 3" in err
    rows = chain.rows(directory)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert (row["rollout/logprob_gap_max"] or 0) < 1e-3
    assert not left_over(directory)


def engine(processes: list[int]) -> int:
    """The process that works below a server's."""
    server = max(processes)
    found = subprocess.run(["pgrep", "-P", f"{server}"], capture_output=True, text=True, check=True)
    return max(map(int, found.stdout.split()))
