"""Starts worker.py in several gloo processes, once per world size and session, and reads what each
rank found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parity.generation_cases import end_ids

ROOT = Path(__file__).resolve().parents[2]
_found: dict[int, tuple[Path, list[dict[str, Any]]] | AssertionError] = {}


def ranks(world: int, folders: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(OUT_DIR, what each of `world` processes found), rank 0 first. Raises AssertionError with the
    workers' output when one fails."""
    if world not in _found:
        _found[world] = _start(world, folders.mktemp(f"world{world}"))
    found = _found[world]
    # every test that needs these ranks fails by it, and none starts them again
    if isinstance(found, AssertionError):
        raise found
    return found


def _start(world: int, out: Path) -> tuple[Path, list[dict[str, Any]]] | AssertionError:
    ends = out / "ends.json"
    ends.write_text(json.dumps(end_ids()))
    try:
        run_workers(Path(__file__).parent / "worker.py", world, str(out), str(ends))
    except AssertionError as error:
        return error
    return out, [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(world)]


def run_workers(script: Path, num_processes: int, *args: str, timeout: float = 560) -> str:
    """Runs `script args…` under torchrun and returns what it printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_processes),
    ]
    process = subprocess.Popen(
        [*start, str(script), *args],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"{script.name}: no end after {timeout} s\n{output[-6000:]}") from None
    assert process.returncode == 0, f"{script.name}: exit {process.returncode}\n{output[-6000:]}"
    return output


def write_result(out_dir: Path, rank: int, result: dict[str, Any]) -> None:
    (out_dir / f"rank_{rank}.json").write_text(json.dumps(result))
