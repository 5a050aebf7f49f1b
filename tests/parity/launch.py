"""Starts worker.py in several gloo processes, once per world size and session, and reads what each
rank found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.parity.generation_cases import end_ids

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
    worker = Path(__file__).parent / "worker.py"
    try:
        done = forked.run(worker, str(out), str(ends), ranks=world)
        assert done.code == 0, f"exit {done.code}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    except AssertionError as error:
        return error
    return out, [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(world)]


def write_result(out_dir: Path, rank: int, result: dict[str, Any]) -> None:
    (out_dir / f"rank_{rank}.json").write_text(json.dumps(result))
