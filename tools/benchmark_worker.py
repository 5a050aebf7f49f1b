"""Calls of an object in another process, and the memory of a process. Linux only.

Processes are forked from a server that has imported the modules of `preload` and has done nothing
else, so all begin with the same resident memory.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
MIB = 2**20


def preload(modules: Sequence[str]) -> None:
    """Name the modules that the server imports. Call it before the first Worker starts."""
    CONTEXT.set_forkserver_preload(list(modules))


class Worker:
    """Calls of methods of `make(*arguments)`, which is made and stays in a new process."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait for the object. Raises RuntimeError with the traceback of its process."""
        self._answer()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Call a method and return its result. Raises RuntimeError as `ready`."""
        self._pipe.send((method, arguments))
        return self._answer()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            failed, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a process of the benchmark ended with exit code {self._process.exitcode}:"
                " -9 is a lack of memory"
            ) from None
        if failed:
            raise RuntimeError(value)
        return value


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")  # of libraries about each other
    try:
        served = make(*arguments)
        pipe.send((False, None))
        while True:
            method, words = pipe.recv()
            pipe.send((False, getattr(served, method)(*words)))
    except EOFError:
        return
    except BaseException:
        pipe.send((True, traceback.format_exc()))
        raise


# ------------------------------------------------------------------------------------------- memory


def resident() -> int:
    """Return the bytes of this process that are in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """Return the most bytes that were in memory at once, since the start or `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Give free memory back to the system and measure the peak from here on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux")
