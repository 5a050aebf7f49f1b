"""launch/multinode.sh: two torchrun agents on this machine, as two nodes are two; and what it
refuses."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.runs import chain

SCRIPT = chain.ROOT / "launch" / "multinode.sh"


def free_port() -> int:
    """Below the range that the kernel hands out: torchrun takes it seconds later, and other tests
    open ports all the while."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as s, suppress(OSError):
            s.bind(("localhost", port))
            return port
    raise AssertionError("no free port")


def environment(**more: str) -> dict[str, str]:
    return {
        **chain.environment(),
        "PYTHON": sys.executable,
        "HEAD": "localhost",
        "NPROC_PER_NODE": "1",
        **more,
    }


@pytest.mark.multiprocess
def test_two_nodes_and_a_worker_that_dies(tmp_path: Path) -> None:
    """Both torchruns start their workers again, which continue at the newest checkpoint: every step
    is logged once."""
    directory = tmp_path / "run"
    settings = chain.sft(
        directory,
        "run.steps=20",
        "run.save_every=1",
        "run.keep=1",
        "run.eval_every=0",
        "parallel.pipeline=2",
    )
    env = environment(NNODES="2", PORT=str(free_port()), RUN_ID="test", MAX_RESTARTS="3")
    command = ["bash", str(SCRIPT), *settings]
    with chain.session(command, env) as first, chain.session(command, env) as second:
        nodes = (first, second)
        chain.wait_for(lambda: chain.logged(directory, 3), first)
        workers = psutil.Process(first.pid).children(recursive=True)
        next(p for p in workers if "launch/train.py" in p.cmdline()).kill()
        said = [process.communicate(timeout=400) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said
    # the check, on either node
    assert all("2 processes = tensor 1 × pipeline 2 × data 1" in out for out, _ in said)
    printed = "".join(out for out, _ in said)
    assert printed.count("tiny/sft: started;") == 1
    # torchrun may count a slow node as dead and start all once more
    assert printed.count("tiny/sft: resumed from") >= 1
    assert printed.count("tiny/sft: complete at step 20 of 20") == 1
    assert [row["step"] for row in chain.rows(directory)] == list(range(1, 21))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"NNODES": "2"}, ["run.sed: unknown key", "did you mean 'seed'?"]),
        ({"NNODES": ""}, ["set NNODES"]),
        ({"NNODES": "2", "HEAD": ""}, ["set HEAD"]),
    ],
)
def test_mistakes_start_nothing(changes: dict[str, str], words: list[str], tmp_path: Path) -> None:
    settings = chain.sft(
        tmp_path / "run", *(["run.sed=1"] if "run.sed: unknown key" in words else [])
    )
    command = ["bash", str(SCRIPT), *settings]
    done = subprocess.run(
        command,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr


SRUN = """#!/usr/bin/env bash
echo "srun $*"
echo "NNODES=$NNODES HEAD=$HEAD RUN_ID=$RUN_ID"
trap 'echo "step: USR1"; exit 1' USR1
touch "$STARTED"
if [ -n "$CODE" ]; then exit "$CODE"; fi
while :; do sleep 0.05; done
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node01\\nnode02\\n'; else echo "scontrol $*"; fi
"""


@pytest.mark.parametrize("code", ["0", "3", ""])
def test_slurm(code: str, tmp_path: Path) -> None:
    """Against stand-ins for srun and scontrol: a step that ends hands on its code, one that is
    warned of the time limit is queued again."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    started = tmp_path / "started"
    slurm = {
        "SLURM_SUBMIT_DIR": str(chain.ROOT),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[01-02]",
        "SLURM_JOB_ID": "77",
    }
    env = {
        **os.environ,
        **slurm,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "STARTED": str(started),
        "CODE": code,
    }
    command = [
        "bash",
        str(chain.ROOT / "launch" / "slurm.sbatch"),
        "recipe=tiny/sft",
        "run.steps=2",
    ]
    job = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    if not code:
        chain.wait_for(started.exists, job, timeout=120)
        job.send_signal(signal.SIGUSR1)
    out = job.communicate(timeout=120)[0].splitlines()
    assert (
        out[0] == "srun --nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=0 bash launch/multinode.sh"
        " recipe=tiny/sft run.steps=2"
    )
    assert out[1] == "NNODES=2 HEAD=node01 RUN_ID=slurm-77-0"
    if code:
        assert (job.returncode, len(out)) == (int(code), 2)
    else:
        assert job.returncode == 0 and "step: USR1" in out and out[-1] == "scontrol requeue 77"
        assert any("torchrun exited 1" in line for line in out)
