"""One run folder, one run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.training import run_lock
from gipo_megatron.training.run_lock import RunLock

HOLD = (
    "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True);"
)
OTHER = {"host": "node7", "pid": 7, "since": "2026-01-02 03:04:05"}


def written(folder: Path, owner: dict | str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "lock"
    path.write_text(owner if isinstance(owner, str) else json.dumps(owner), encoding="utf-8")
    return path


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], list[int]]:
    """Call a function instead of each second's sleep; returns the seconds slept."""

    def replace(second: Callable[[int], None]) -> list[int]:
        slept: list[int] = []

        def sleep(duration: float) -> None:
            assert duration == 1
            slept.append(len(slept))
            second(slept[-1])

        monkeypatch.setattr(run_lock.time, "sleep", sleep)
        return slept

    return replace


def test_the_lock_names_its_owner_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with RunLock(folder) as lock:
        lock.take()
        owner = json.loads((folder / "lock").read_text(encoding="utf-8"))
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
        assert [path.name for path in folder.iterdir()] == ["lock"]
        with RunLock(folder) as second, pytest.raises(UserError) as error:
            second.take()
        assert f"process {os.getpid()} on {socket.gethostname()}" in error.value.what
        assert (error.value.where, owner["since"] in error.value.what) == ("run.dir", True)
        assert str(folder / "lock") in error.value.fix
        assert (folder / "lock").exists()  # the refused one removed nothing
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_stays(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    with RunLock(tmp_path / "run") as lock:  # and again at once
        lock.take()


def test_a_lock_that_is_not_taken_removes_nothing(tmp_path: Path) -> None:
    """As on ranks other than 0."""
    path = written(tmp_path / "run", OTHER)
    with RunLock(tmp_path / "run"):
        pass
    assert path.exists()


def test_a_process_that_lives_keeps_its_lock_and_one_that_was_killed_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    here = {"host": socket.gethostname(), "pid": 7, "since": "2026-01-02 03:04:05"}
    path = written(folder, here)
    command = [sys.executable, "-I", "-S", "-c", HOLD + "input()", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with RunLock(folder) as lock, pytest.raises(UserError, match="process 7 on "):
            lock.take()
        holder.kill()
    with RunLock(folder) as lock:
        lock.take()
        assert json.loads(path.read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert "taken over from process 7" in capsys.readouterr().out


@pytest.mark.parametrize("torn", ["", "{", "[1]", '{"host": "a"}'])
def test_a_torn_lock_is_taken(tmp_path: Path, torn: str) -> None:
    path = written(tmp_path / "run", torn)
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        assert json.loads(path.read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not path.exists()


def test_another_host_without_a_beat_is_taken_over(
    tmp_path: Path, seconds: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    slept = seconds(lambda second: None)
    written(tmp_path / "run", OTHER)
    with RunLock(tmp_path / "run") as lock:
        lock.take()
    assert len(slept) == run_lock.WATCH >= 5 * run_lock.BEAT
    said = capsys.readouterr().out
    assert "belongs to process 7 on node7, since 2026-01-02 03:04:05" in said
    assert "taken over from process 7 on node7" in said


def test_another_host_with_a_beat_is_refused(tmp_path: Path, seconds: Callable) -> None:
    path = written(tmp_path / "run", OTHER)

    def beat(second: int) -> None:
        if second == 4:
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))

    slept = seconds(beat)
    with RunLock(tmp_path / "run") as lock, pytest.raises(UserError, match="process 7 on node7"):
        lock.take()
    assert len(slept) == 5 and json.loads(path.read_text(encoding="utf-8")) == OTHER
    with RunLock(tmp_path / "run") as lock:  # the refused one let go of it
        seconds(lambda second: None)
        lock.take()


def test_another_host_that_ends_in_the_meantime(
    tmp_path: Path, seconds: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "run", OTHER)
    slept = seconds(lambda second: path.unlink())
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        assert json.loads(path.read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert len(slept) == 1 and "taken over" not in capsys.readouterr().out


def test_a_file_system_without_locks_relies_on_the_beat(
    tmp_path: Path, seconds: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    here = {"host": socket.gethostname(), "pid": 7, "since": "2026-01-02 03:04:05"}
    path = written(tmp_path / "run", here)
    seconds(lambda second: os.utime(path, ns=(1, path.stat().st_mtime_ns + 1)))
    with RunLock(tmp_path / "run") as lock, pytest.raises(UserError, match="process 7"):
        lock.take()
    slept = seconds(lambda second: None)
    with RunLock(tmp_path / "run") as lock:
        lock.take()
    assert len(slept) == run_lock.WATCH


def test_the_owner_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.001)
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        os.utime(lock.path, ns=(1, 1))
        while lock.path.stat().st_mtime_ns == 1:
            pass


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_lock.os, "pwrite", full)
    with RunLock(tmp_path / "run") as lock, pytest.raises(UserError, match="No space left"):
        lock.take()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_has_become_read_only_keeps_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    with RunLock(tmp_path / "run") as lock:
        lock.take()
        monkeypatch.setattr(Path, "unlink", read_only)
    assert (tmp_path / "run" / "lock").exists()


def test_a_lock_beside_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    out = tmp_path / "models" / "out"
    words = (out, tmp_path / "models" / "out.lock", "out")
    with RunLock(*words) as lock:
        lock.take()
        assert not out.exists()
        with RunLock(*words) as second, pytest.raises(UserError) as error:
            second.take()
        assert error.value.where == "out" and "choose another out;" in error.value.fix
        assert error.value.what.startswith(f"{out} is in use by another run: process {os.getpid()}")
    assert not list(tmp_path.iterdir())


def test_a_copied_folder_is_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with RunLock(tmp_path / "copy") as other:
            other.take()
        assert not (tmp_path / "copy" / "lock").exists() and (tmp_path / "run" / "lock").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", tmp_path / ("n" * 300)):
        with RunLock(folder) as lock, pytest.raises(UserError, match="cannot write"):
            lock.take()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
