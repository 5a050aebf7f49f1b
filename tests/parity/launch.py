"""Starts a worker script in several gloo processes, once, and reads what each rank found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_workers(script: str | Path, nproc: int, out_dir: str | Path, *args: str, timeout: float = 300) -> list[dict[str, Any]]:
    """Runs `script OUT_DIR args…` under torchrun; each rank writes OUT_DIR/rank_R.json (see `write_result`). Returns them, rank 0 first.

    A relative script is looked up beside this file. Raises AssertionError with the workers' output when one of them fails.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).parent / script
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(nproc),
        str(script),
        str(out_dir),
        *args,
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"{script.name}: no end after {timeout} s\n{output[-6000:]}") from None
    assert process.returncode == 0, f"{script.name}: exit {process.returncode}\n{output[-6000:]}"
    return [json.loads((out_dir / f"rank_{rank}.json").read_text()) for rank in range(nproc)]


def write_result(out_dir: str | Path, rank: int, result: dict[str, Any]) -> None:
    (Path(out_dir) / f"rank_{rank}.json").write_text(json.dumps(result))
