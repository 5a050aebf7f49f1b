"""The end of a world in which a rank hangs, with the name of that rank and its last phase.

Each rank has a thread that writes a sign of life into a store of torch.distributed: the phase of
the run, and the line that the main thread executes. The thread reads the sign of the next rank. A
rank without a new sign for `timeout` seconds is stopped, frozen or cut off; then all others end
with exit code 2. A thread does this, because the main threads are in an exchange with that rank,
which nothing interrupts.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from gipo_megatron.errors import UserError
from gipo_megatron.telemetry.sinks import Sink

SIGNS = 20  # in a time-out, at least
LONGEST = 5.0  # seconds from one sign to the next
EXCHANGE = 1.5  # time-outs that an exchange may last: a silent rank is found first
SHOWN = 8  # ranks in a message
FIX = "look at that process and its machine; the same command continues from the last checkpoint"
_FAILURE, _ENDED = "failure", "ended"
_phase, _changed = "start", threading.Event()  # of this process


def enter(phase: str) -> None:
    """Set the phase that the next sign of this process has."""
    global _phase
    _phase = phase
    _changed.set()


class Phases(Sink):
    """Gives this process's signs the phases of a run; it is on every rank."""

    def __init__(self) -> None:
        self._done = ""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._done = f" after step {step}"

    def phase(self, name: str) -> None:
        enter((name or "between phases") + self._done)


class Watch:
    """The thread of one rank: with Watch(timeout): …; none in a world of one process."""

    def __init__(self, timeout: float, leave: Callable[[], None] = lambda: os._exit(2)) -> None:
        self.timeout, self.tick, self._leave = timeout, min(LONGEST, timeout / SIGNS), leave
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._main, self._ended = threading.get_ident(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        enter("start")
        if self.world > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        _changed.set()
        if self.world > 1:
            self._thread.join(self.timeout)

    def late(self, error: Exception) -> str:
        """Return the message for an exchange that a rank did not enter in time, with the last phase
        of each rank; "" for another error. Gloo's has no class of its own."""
        if self.world == 1 or "timed out" not in str(error).lower():
            return ""
        with suppress(RuntimeError):
            return str(_late(connect(self.timeout), self.world, EXCHANGE * self.timeout))
        return ""

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store has gone, and with it the process that had it
            store = connect(self.timeout)
            self._watch(store)
            store.set(str(self.rank), _ENDED)

    def _watch(self, store: dist.Store) -> None:
        """Count own signs while the next rank's stays the same: where all ranks are stopped and
        continued together, seconds would be wrong."""
        following = (self.rank + 1) % self.world
        seen, silent, count = "", 0, 0
        while not self._ended:
            changed = _changed.wait(self.tick)
            _changed.clear()
            count += 1
            store.set(str(self.rank), self._sign(count))
            if changed:
                continue
            if store.check([_FAILURE]):
                return self._leave()
            sign = read(store, following)
            silent = silent + 1 if sign == seen != _ENDED else 0
            seen = sign
            if silent * self.tick >= self.timeout:
                return self._end(store, silence(following, seen, self.timeout))

    def _sign(self, count: int) -> str:
        frame, line = sys._current_frames().get(self._main), ""
        if frame is not None:
            code = frame.f_code
            line = f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
        return json.dumps([count, _phase, line, self._process])

    def _end(self, store: dist.Store, error: UserError) -> None:
        """End all ranks. The rank that is the first to find the error prints it."""
        mine = f"{self.rank}\n{error}"
        if store.compare_set(_FAILURE, "", mine).decode() == mine:
            sys.stdout.flush()
            print(error, file=sys.stderr, flush=True)
        self._leave()


def connect(timeout: float) -> dist.Store:
    """Return a connection of its own to the launcher's store: an operation of another thread, which
    may wait for another rank, would block a shared one."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=timeout)
    store = dist.TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False)
    # torchrun starts failed ranks again, with the same store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"gipo_megatron/watch/{attempt}", store)


def read(store: dist.Store, rank: int) -> str:
    """Return a rank's last sign; "" before its first."""
    return store.get(str(rank)).decode() if store.check([str(rank)]) else ""


def silence(rank: int, sign: str, timeout: float) -> UserError:
    """Return the error for a rank without a new sign."""
    where = f"parallel.timeout: {timeout:g}"
    if not sign:
        what = f"rank {rank} has not started: no sign of life for {timeout:g} s"
        return UserError(what, where=where, fix="look at the output of its launcher")
    _, phase, line, process = json.loads(sign)
    what = f"rank {rank} hangs: no sign of life for {timeout:g} s; last phase: {phase}, in {line}"
    return UserError(f"{what}; {process}", where=where, fix=FIX)


def _late(store: dist.Store, world: int, seconds: float) -> UserError:
    ranks: dict[str, list[int]] = {}
    for rank in range(world):
        sign = read(store, rank)
        _, phase, line, _ = json.loads(sign) if sign.startswith("[") else (0, sign, "-", "")
        ranks.setdefault(f"{phase}, in {line}", []).append(rank)
    # the fewest first: all others wait for them
    found = sorted(ranks.items(), key=lambda item: len(item[1]))[:SHOWN]
    shown = "; ".join(f"rank {', '.join(map(str, who[:SHOWN]))}: {at}" for at, who in found)
    return UserError(
        f"an exchange between ranks did not end in {seconds:g} s; last phases: {shown}",
        where="parallel.timeout",
        fix=FIX,
    )
