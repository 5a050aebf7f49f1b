"""Faults of a machine: a disk that is full, that takes no large file, or that becomes read-only; a
clock that jumps; a process that is stopped."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PAGE = 4096  # a tmpfs counts in pages
YEAR = 365 * 24 * 3600 * 10**9  # nanoseconds
# linux/fs.h: the flags of a file, and the one that forbids any change, to root, too
GET_FLAGS, SET_FLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10


def can_mount() -> bool:
    """Return whether this process may mount a disk of its own."""
    return os.geteuid() == 0 and not _mount("-f", "-t", "tmpfs", "tmpfs", "/tmp").returncode


class Disk:
    """A tmpfs with so many free pages and new files as `limit` gave it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @property
    def used(self) -> tuple[int, int]:
        """Return the pages and the files, folders and links in use."""
        found = os.statvfs(self.place)
        return found.f_blocks - found.f_bfree, found.f_files - found.f_ffree

    def limit(self, *, pages: int = 2**20, files: int = 2**20) -> None:
        """Set the size, in pages, and the number of files, folders and links."""
        self._remount(f"size={max(pages, 1) * PAGE},nr_inodes={files}")

    def read_only(self, on: bool) -> None:
        self._remount("ro" if on else "rw")

    def _remount(self, options: str) -> None:
        done = _mount("-o", f"remount,{options}", str(self.place))
        assert done.returncode == 0, done.stderr


@contextmanager
def disk(base: Path) -> Iterator[Disk]:
    """Mount a tmpfs at BASE/disk; that of a campaign that was killed goes first."""
    place = base / "disk"
    place.mkdir(exist_ok=True)
    while os.path.ismount(place):
        _unmount(place)
    done = _mount("-t", "tmpfs", "tmpfs", str(place))
    assert done.returncode == 0, done.stderr
    try:
        yield Disk(place)
    finally:
        _unmount(place)


def _mount(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["mount", *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def _unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def small_files(rank: int, size: int) -> None:
    """Let this process write no file of more than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_output(rank: int, streams: tuple[int, ...]) -> None:
    """Put the file descriptors `streams` of this process onto a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    for stream in streams:
        os.dup2(full, stream)
    os.close(full)


def output(rank: int, file: Path, room: int) -> None:
    """Let this process print into `file`, which takes `room` bytes more."""
    file.write_bytes(bytes(PAGE - room))
    handle = os.open(file, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.close(handle)


def freeze(folder: Path, on: bool) -> None:
    """Forbid, or allow again, any change of a folder, of those below it, and of their files."""
    for place, _, files in os.walk(folder, topdown=not on):
        for path in (place, *(os.path.join(place, name) for name in files)):
            if not os.path.islink(path):
                _set_immutable(path, on)


def _set_immutable(path: str, on: bool) -> None:
    handle = os.open(path, os.O_RDONLY)
    flags = ctypes.c_int()
    fcntl.ioctl(handle, GET_FLAGS, flags)
    flags.value = flags.value | IMMUTABLE if on else flags.value & ~IMMUTABLE
    fcntl.ioctl(handle, SET_FLAGS, flags)
    os.close(handle)


def moving_clock(rank: int, seed: int) -> None:
    """Let time.time() of this process jump at each call, by up to a year in both directions. The
    clocks that only rise (monotonic, perf_counter) stay."""
    noise, real = random.Random(seed), time.time_ns

    def now() -> int:
        return real() + noise.randrange(-YEAR, YEAR)

    def local(seconds: float | None = None) -> time.struct_time:
        return there(now() / 1e9 if seconds is None else seconds)

    def text(form: str, moment: Any = None) -> str:
        return formatted(form, moment or local())

    there, formatted = time.localtime, time.strftime
    time.time_ns, time.time = now, lambda: now() / 1e9
    time.localtime, time.strftime = local, text  # type: ignore[assignment]


def stopped(process: int) -> bool:
    """Return whether SIGSTOP has stopped a process."""
    with suppress(OSError):
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        return stat.rsplit(")", 1)[1].split()[0] == "T"
    return False
