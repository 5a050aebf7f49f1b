"""Parent of a server: `python watchdog.py COMMAND…` runs it, and ends it and all its processes
when stdin ends or the process that started this one is gone, however it died.

Imports only the standard library, and runs as a script.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

# Linux: this process becomes the parent of orphans below it; a signal for the death of a parent
PR_SET_CHILD_SUBREAPER = 36
PR_SET_PDEATHSIG = 1
TICK = 0.1  # seconds
PATIENCE = 10.0  # seconds from SIGTERM to SIGKILL, and from there to giving up


def main(command: list[str]) -> int:
    """Return the server's exit code, 128 + N where a signal N ended it; 0 where this process ended
    it."""
    parent = os.getppid()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signalled, _: received.append(signalled))
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(libc.prctl, PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    codes: dict[int, int] = {}
    while not received and os.getppid() == parent and server.pid not in codes:
        ended, _, _ = select.select([sys.stdin], [], [], TICK)
        if ended:
            break
        reap(codes)
    if (code := codes.get(server.pid, 0)) == -signal.SIGKILL:
        print("the server was ended by SIGKILL; the machine may have run out of memory", flush=True)
    end(server.pid, codes)
    server.returncode = code  # was read above
    return code if code >= 0 else 128 - code


def reap(codes: dict[int, int]) -> bool:
    """Put the exit codes of children that have ended into `codes`; return whether some are left."""
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            codes[found[0]] = os.waitstatus_to_exitcode(found[1])
    except ChildProcessError:
        return False
    return True


def end(server: int, codes: dict[int, int]) -> None:
    """End the server's process group, and what left the group, once it is this one's child."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        send(-server, number)
        signalled = {server}
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if not reap(codes):
                return
            for process in set(children()) - signalled:
                send(process, number)
                signalled.add(process)
            time.sleep(TICK)


def children() -> list[int]:
    """Return the ids of this process's children; none on a system that does not list them."""
    own = Path("/proc/thread-self/children")
    return [int(word) for word in own.read_text(encoding="ascii").split()] if own.is_file() else []


def send(process: int, number: int) -> None:
    """Send a signal to a process, or to a group where the number is negative."""
    with suppress(ProcessLookupError):
        os.kill(process, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
