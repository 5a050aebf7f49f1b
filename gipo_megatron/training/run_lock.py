"""One run folder, one run: a lock file in it that names its owner.

The kernel releases the lock (flock) when its owner dies. Not every network file system shares locks
between hosts, so the owner also sets the file's time every BEAT seconds: where its host is another
one, the folder is taken over after WATCH seconds without a new time.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gipo_megatron.errors import UserError
from gipo_megatron.files import user_errors
from gipo_megatron.screen import printable
from gipo_megatron.training.run_folder import check_writable

BEAT = 5  # seconds
WATCH = 30  # seconds: six beats


@dataclass(frozen=True)
class Owner:
    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return printable(f"process {self.pid} on {self.host}, since {self.since}")


class RunLock:
    """The lock of a run folder: with RunLock(folder) as lock: lock.take()

    path: its file, where `folder`, of the recipe key or option `key`, appears only at the end.
    """

    def __init__(self, folder: Path, path: Path | None = None, key: str = "run.dir") -> None:
        self.folder, self.path, self._key = folder, path or folder / "lock", key
        self._file: int | None = None
        self._made: list[Path] = []  # folders made for the lock
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the lock, and the folder where it is still empty."""
        if self._file is None:
            return
        self._ended.set()
        if self._beating.ident is not None:
            self._beating.join()
        with suppress(OSError):  # the folder may be read-only by now
            if self._is_current(self._file):
                self.path.unlink()
        os.close(self._file)
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def take(self) -> None:
        """Make the folder and become its owner. Raises UserError where another run owns it, or
        where it cannot be written."""
        check_writable(self.folder, self._key)
        here = Owner(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
        places = self.path.parents
        self._made = [place for place in places if not os.path.lexists(place)]
        with user_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._locked(here.host)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(asdict(here)).encode() + b"\n", 0)
        self._beating.start()

    def _locked(self, host: str) -> int:
        """Return the locked file. Prints the name of a last owner that did not release it."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                owner, kernel = self._owner(), self._flock(file)
                if owner is not None and not (kernel and owner.host == host):
                    self._watch(owner)
                if self._is_current(file):  # else its owner removed it meanwhile
                    if owner is not None:
                        print(f"note: {self.folder} is taken over from {owner}, which has ended")
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _flock(self, file: int) -> bool:
        """Return False where the file system has no locks. Raises UserError where another process
        has this one."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(self._owner()) from None
        except OSError:
            return False
        return True

    def _watch(self, owner: Owner) -> None:
        """Raises UserError where the owner gives the file a new time."""
        wait = f"waiting {WATCH} s for a sign of life"
        print(f"note: {self.folder} belongs to {owner}; {wait}", flush=True)
        before = self._time()
        for _ in range(WATCH):
            time.sleep(1)
            now = self._time()
            if now is None:
                return
            if now != before:
                raise self._refusal(owner)

    def _refusal(self, owner: Owner | None) -> UserError:
        return UserError(
            f"{self.folder} is in use by another run: {owner or 'it has just started'}",
            where=self._key,
            fix=f"wait for it or stop it, or choose another {self._key}; if that process is gone,"
            f" remove {self.path}",
        )

    def _owner(self) -> Owner | None:
        with suppress(OSError, ValueError, TypeError):  # no file, or not written whole
            return Owner(**json.loads(self.path.read_text(encoding="utf-8")))
        return None

    def _time(self) -> int | None:
        """Return the time of the file; None where there is none. Opened first: a network file
        system then reads it from its server."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
        return None

    def _is_current(self, file: int) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        return False

    def _beat(self) -> None:
        assert self._file is not None
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self._file)
