"""Worker processes of tools/gpu_verify.py. Standard library only: torch is for the workers."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT = 300  # seconds until a worker has imported torch


class Mistake(Exception):
    """Of the user: one line to print, exit code 2."""


class Worker:
    """A process that runs the parts named on its stdin, and prints one JSON line a figure."""

    def __init__(self, settings: dict[str, Any], env: dict[str, str], log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tools.gpu.worker", json.dumps(settings)],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead; `next` reports that
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None: it is dead. Raises queue.Empty when none comes in time."""
        line = self._lines.get(timeout=max(seconds, 0.01))
        return None if line is None else json.loads(line)

    def kill(self) -> str:
        """End it with all that it started. Returns how it had ended by itself, or ""."""
        try:
            code = self.process.wait(timeout=0.5)  # its pipe may close before it is gone
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # a call that hangs in the driver outlives SIGKILL
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        self._reader.join(timeout=10)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        if code is None:
            return ""
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@dataclass
class Workers:
    """One an environment, started at first use: "plain", or "te" with TE's folder on its path."""

    settings: dict[str, Any]
    te: str | None
    log: Path
    alive: dict[str, Worker] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)  # environment -> why no worker starts

    def get(self, place: str) -> Worker | None:
        """None: it does not start, see `broken`. Raises Mistake where the device is missing."""
        if place in self.alive or place in self.broken:
            return self.alive.get(place)
        more = [self.te] if place == "te" and self.te else []
        env = environment(self.settings["device"], more)
        env["TMPDIR"] = self.settings["scratch"]  # what a killed process cannot clear away
        worker = Worker(self.settings, env, self.log)
        try:
            message = worker.next(START_LIMIT)
        except queue.Empty:
            message = None
        except KeyboardInterrupt:
            worker.kill()
            raise
        if message is not None and "ready" in message:
            self.alive[place] = worker
            return worker
        ended = worker.kill()
        if message is not None:
            raise Mistake(message["mistake"])
        reason = ended or f"not ready after {START_LIMIT} s"
        self.broken[place] = f"its worker does not start: {reason}; see {self.log.name}"
        return None

    def kill(self, place: str) -> str:
        return self.alive.pop(place).kill()

    def close(self) -> None:
        for place in list(self.alive):
            self.kill(place)


def environment(device: str, more: Sequence[str] = ()) -> dict[str, str]:
    """This process's, with the checkout and `more` on the path, and defaults for one process."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    before = env.get("PYTHONPATH", "")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *more, *([before] if before else [])])
    defaults = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        return {"OMP_NUM_THREADS": "1", **defaults, **env, "CUDA_VISIBLE_DEVICES": ""}
    network = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}  # none is needed
    return {**network, **defaults, **env}
