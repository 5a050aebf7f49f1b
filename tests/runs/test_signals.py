"""Interrupted runs: the step ends, a checkpoint is written, the same command continues."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from gipo_megatron.commands import train
from tests.runs import chain

SLOW = ["algorithm.reward={name: function, function: tests.runs.rewards:slow}", "run.eval_every=0"]


def ends(process: subprocess.Popen[str], seconds: float = 200) -> tuple[str, str]:
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err
    return out, err


def interrupt(number: signal.Signals, directory: Path, base: Path) -> None:
    """Started as by a user, interrupted in step 3: exit 0, a checkpoint, advice, no `final`."""
    with chain.running(chain.long_gipo(directory, base)) as run:
        chain.wait_for(lambda: chain.logged(directory, 2), run)
        run.send_signal(number)
        out, err = ends(run)
    assert (run.returncode, err) == (0, "")
    last = out.splitlines()[-1]
    step = len(chain.rows(directory)) - 1
    assert (
        last == f"tiny/gipo: interrupted ({number.name}) at step {step} of 5;"
        f" {directory}/checkpoints/step_{step}; the same command continues"
    )
    assert step < 5 and (directory / "checkpoints" / f"step_{step}" / "meta.json").is_file()
    assert not (directory / "final").exists() and not list(directory.rglob("*.tmp"))


@pytest.mark.multiprocess
def test_interrupted_and_continued(base: Path) -> None:
    directories = {number: base / number.name for number in (signal.SIGTERM, signal.SIGINT)}
    for number, directory in directories.items():
        interrupt(number, directory, base)
    chain.run_cases(
        [chain.long_gipo(directory, base) for directory in directories.values()], base, processes=1
    )
    for directory in directories.values():
        chain.same_story(directory, base / "gipo_long")
        assert (directory / "final").exists()


@pytest.mark.multiprocess
def test_a_second_ctrl_c_stops_at_once(base: Path) -> None:
    """One press arrives twice under torchrun, so a repetition within two seconds is none.

    The run also shows that no first step waits for an import that it does not need.
    """
    directory = base / "twice"
    with chain.running(chain.long_gipo(directory, base, *SLOW)) as run:
        chain.wait_for(lambda: (directory / "log.txt").exists(), run)
        time.sleep(1.0)  # in the first step, which takes a second a response
        run.send_signal(signal.SIGINT)
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        time.sleep(2.5)
        assert run.poll() is None
        run.send_signal(signal.SIGINT)
        out, err = ends(run)
    assert (run.returncode, err) == (130, f"{train.STOPPED}\n")
    assert not chain.logged(directory, 1)  # the step was not finished
    compiled = torch.cuda.is_available()  # Megatron-Core's fused kernels are, on a GPU
    early = next(line for line in out.splitlines() if line.startswith("imported:")).split()[1:]
    assert not [name for name in early if not (compiled and name.startswith("torch."))]


@pytest.mark.multiprocess
def test_ctrl_c_under_torchrun(base: Path) -> None:
    """The terminal signals torchrun's process group; torchrun passes it on to its workers, which
    run in sessions of their own."""
    directory = base / "torchrun"
    with chain.running(chain.long_gipo(directory, base), processes=2) as run:
        chain.wait_for(lambda: chain.logged(directory, 2), run)
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=200)
    # torchrun's own; its workers end orderly
    assert run.returncode == 1 and "SignalException" in err
    assert "interrupted (SIGINT) at step" in out and out.endswith("; the same command continues\n")
    assert 'gipo_megatron/cli.py", line' not in err  # no traceback of ours
    step = len(chain.rows(directory)) - 1
    assert (
        2 < step < 5 and not (directory / "final").exists() and not list(directory.rglob("*.tmp"))
    )
