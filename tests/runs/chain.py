"""Arguments of tiny runs that take a second each, and how to read what they leave."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import forked
from tests.forked import ROOT
from tools.faults.runs import (  # noqa: F401  (tests call them by this module)
    SMALL,
    difference,
    dpo,
    logged,
    ppo,
    reward_model,
    rows,
    sft,
)


def long_gipo(directory: Path, base: Path, *more: str) -> list[str]:
    """What `base` has uninterrupted as gipo_long."""
    return ppo("gipo", directory, base, "run.steps=5", "run.save_every=1", "run.keep=2", *more)


def adapted(base: Path) -> list[list[str]]:
    """Return the chain with adapters: BASE/lora_sft, lora_rm, lora_gipo."""
    rank = "model.adapter.rank=4"
    return [
        sft(base / "lora_sft", rank),
        reward_model(base / "lora_rm", base / "lora_sft", rank),
        adapted_gipo(base / "lora_gipo", base),
    ]


def adapted_gipo(directory: Path, base: Path, *more: str) -> list[str]:
    loads = [
        f"models.actor.load={base}/lora_sft/final",
        f"models.reward.load={base}/lora_rm/final",
    ]
    return ppo("gipo", directory, base, *loads, "model.adapter.rank=4", *more)


def close(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a == b
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "PYTHONWARNINGS": "ignore",
    }


@dataclass(frozen=True)
class Outcome:
    """Of one case of a worker."""

    printed: str
    error: str  # UserError's text; empty: it ran


def outcomes(
    cases: list[list[str]], folder: Path, processes: int = 1, timeout: float = 400
) -> list[Outcome]:
    """All cases in one start of `processes` processes, whether they end well or by a message."""
    file = folder / f"cases_{len(list(folder.glob('cases_*')))}_{processes}.json"
    file.write_text(json.dumps(cases))
    worker = ROOT / "tests" / "runs" / "worker.py"
    done = forked.run(worker, str(file), ranks=processes, timeout=timeout)
    assert done.code == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return [Outcome(**one) for one in json.loads(file.with_suffix(".out.json").read_text())]


def run_cases(cases: list[list[str]], folder: Path, processes: int, timeout: float = 400) -> None:
    """The same, where all must end well."""
    errors = [one.error for one in outcomes(cases, folder, processes, timeout) if one.error]
    assert not errors, "\n".join(errors)


def python(processes: int) -> list[str]:
    more = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    return [sys.executable, *more]


def launch(
    arguments: list[str], processes: int = 1, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    """launch/train.py as a user starts it, to its end."""
    command = [*python(processes), "launch/train.py", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def running(
    arguments: list[str], processes: int = 1
) -> AbstractContextManager[subprocess.Popen[str]]:
    """launch/train.py, as `session` starts it."""
    return session([*python(processes), "launch/train.py", *arguments], environment())


@contextmanager
def session(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """`command` in a session of its own, as in a terminal; killed with all it started when the test
    is over."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(
    there: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 300
) -> None:
    """Poll until `there()`; fails with what the process, leader of its session, said when it ends
    before or takes too long."""
    end = time.monotonic() + timeout
    while not there():
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()}"
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"waited {timeout:.0f} s: {process.communicate()}")
        time.sleep(0.002)


def same_story(a: Path, b: Path) -> None:
    """Assert that two runs are equal, bit for bit."""
    assert difference(a, b) == ""
