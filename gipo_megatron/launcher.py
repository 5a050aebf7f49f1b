"""Several processes of one command on this machine, as torchrun starts them, but with the command's
own screen and exit code, and without torchrun's report after it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType

from gipo_megatron.environment import emit
from gipo_megatron.errors import UserError

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# seconds after the first failure: to end by itself, then from SIGTERM to SIGKILL
PATIENCE = (1.0, 30.0)
TICK = 0.1
PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent has died


def take_nproc(words: list[str]) -> int:
    """Remove `--nproc N` or `--nproc=N` from `words` and return N; 0 where there is none. Raises
    UserError for what is no number of processes, and under torchrun."""
    found = [i for i, word in enumerate(words) if word.split("=")[0] == "--nproc"]
    if not found:
        return 0
    first = found[0]
    _, equals, text = words[first].partition("=")
    taken = 1 if equals else 2
    text = text if equals else "".join(words[first + 1 : first + 2])
    if len(found) > 1 or not (text.isdecimal() and int(text)):
        raise UserError(
            f"--nproc needs a number of processes, once, not {text!r}",
            where="command line",
            fix="--nproc 8",
        )
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            "--nproc starts processes, and so does torchrun",
            where="command line",
            fix="leave out torchrun, or --nproc (or unset WORLD_SIZE)",
        )
    del words[first : first + taken]
    return int(text)


def launch(command: Sequence[str], processes: int) -> int:
    """Start `command` as ranks 0 … processes - 1 of one world, wait, and return the exit code of
    the rank that failed first, 0 where none did; 128 + N for one that a signal N ended.

    Signals of FORWARDED go to all ranks. After a failure the other ranks are ended. The ranks do
    not outlive this process.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, receive) for number in FORWARDED}
    # where the ranks meet; they may connect before the store is there
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    ranks: list[subprocess.Popen[bytes]] = []
    end_with_parent = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        for rank in range(processes):
            variables = {**os.environ, **world_variables(rank, processes, port)}
            # a session of its own: a signal of the terminal arrives once, through this process
            ranks.append(
                subprocess.Popen(
                    command,
                    env=variables,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            )
        from torch.distributed import TCPStore  # slow to import: while the ranks import it, too

        # as in torchrun it outlives each rank
        store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        assert store.port == port
        return _wait(ranks, received)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def world_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the variables by which torch.distributed finds the world."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Forward what is `received` until all ranks have ended; return the exit code of `launch`."""
    failed: subprocess.Popen[bytes] | None = None
    steps: list[tuple[float, int]] = []  # (time, signal) for the ranks that are left
    while left := [process for process in ranks if process.poll() is None]:
        while received:
            _send(left, received.pop(0))
        if failed is None and (failed := next((p for p in ranks if p.returncode), None)):
            first = time.monotonic() + PATIENCE[0]
            steps = [(first, signal.SIGTERM), (first + PATIENCE[1], signal.SIGKILL)]
        if steps and time.monotonic() >= steps[0][0]:
            _send(left, steps.pop(0)[1])
        time.sleep(TICK)
    failed = failed or next((p for p in ranks if p.returncode), None)
    if failed is None or failed.returncode > 0:
        return 0 if failed is None else failed.returncode
    return _ended_by(signal.Signals(-failed.returncode), ranks.index(failed))


def _ended_by(number: signal.Signals, rank: int) -> int:
    if number not in FORWARDED:
        why = "; the machine may have run out of memory" if number == signal.SIGKILL else ""
        emit(f"rank {rank} was ended by {number.name}{why}")
    return 128 + number


def _send(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        process.send_signal(number)
