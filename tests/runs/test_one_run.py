"""One run folder, one run; and several processes by --nproc."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from gipo_megatron import cli
from gipo_megatron.training.run_lock import RunLock
from tests.runs import chain

pytestmark = [pytest.mark.multiprocess, pytest.mark.global_rng]
LAUNCH = [sys.executable, "launch/train.py", "--nproc", "2"]


def test_a_second_run_is_refused_and_changes_nothing(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that holds the lock has got as far as a checkpoint, from which this would resume."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    directory = base / "gipo_long"

    def contents() -> dict[str, bytes]:
        files = [path for path in directory.rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in files}

    with RunLock(directory) as lock:
        lock.take()
        before = contents()
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", *chain.long_gipo(directory, base, "run.steps=9")])
        assert contents() == before and len(before) > 10
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{directory} is in use by another run: process")
    assert f"process {os.getpid()} on" in err and len(err.splitlines()) == 3


def test_the_screen_of_several_processes_is_one_and_no_rank_waits(tmp_path: Path) -> None:
    """Rank 0 alone sees the lock: the other rank hears of it."""
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        with chain.session(LAUNCH + chain.sft(tmp_path / "run"), chain.environment()) as run:
            out, err = run.communicate(timeout=200)
        assert (run.returncode, out) == (2, "")
        lines = err.splitlines()
        assert lines[0].startswith(f"{tmp_path}/run is in use by another run") and len(lines) == 3
        assert json.loads(lock.path.read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_ctrl_c_under_the_launcher(base: Path) -> None:
    """Once for all ranks: they finish the step, write a checkpoint, and the exit code is 0."""
    directory = base / "launched"
    arguments = chain.long_gipo(directory, base, "run.steps=500")
    with chain.session(LAUNCH + arguments, chain.environment()) as run:
        chain.wait_for(lambda: chain.logged(directory, 2), run)
        os.killpg(run.pid, signal.SIGINT)  # as the terminal does
        out, err = run.communicate(timeout=200)
    assert (run.returncode, err) == (0, "")
    assert "interrupted (SIGINT) at step" in out and out.endswith("; the same command continues\n")
    assert "2 processes" in out and not (directory / "lock").exists()
    assert not (directory / "final").exists() and not list(directory.rglob("*.tmp"))
