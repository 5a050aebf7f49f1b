"""Several processes of one command: their world, their screen, their exit code, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gipo_megatron import cli, launcher
from gipo_megatron.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
HEAD = "import os, signal, sys, time; rank = int(os.environ['RANK']); folder = sys.argv[1]\n"
HEAD += "open(f'{folder}/{rank}', 'w').write(str(os.getpid()))\n"


def command(tmp_path: Path, code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", HEAD + code, str(tmp_path)]


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "PATIENCE", (0.0, 5.0))
    monkeypatch.setattr(launcher, "TICK", 0.01)


def test_each_rank_has_its_place_and_all_meet_at_one_store(tmp_path: Path) -> None:
    code = (
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')\n"
        "print(*(os.environ[n] for n in names), file=open(f'{folder}/world_{rank}', 'w'))\n"
        "import socket; socket.create_connection(('127.0.0.1', int(os.environ['MASTER_PORT'])))"
    )
    assert launcher.launch(command(tmp_path, code), 2) == 0
    for rank in (0, 1):
        world = (tmp_path / f"world_{rank}").read_text(encoding="utf-8")
        assert world == f"{rank} {rank} 2 2 127.0.0.1\n"


def test_the_first_failure_is_the_exit_code_and_ends_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "while not all(os.path.exists(f'{folder}/{r}') for r in (0, 1)): time.sleep(0.01)\n"
        "if rank == 0: print('one screen', file=sys.stderr); sys.exit(2)\n"
        "time.sleep(100)"
    )
    assert launcher.launch(command(tmp_path, code), 2) == 2
    assert capfd.readouterr() == ("", "one screen\n")
    assert gone(int((tmp_path / "1").read_text(encoding="utf-8")))


def test_a_rank_that_is_killed_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)"
    assert launcher.launch(command(tmp_path, code), 2) == 128 + signal.SIGKILL
    assert capfd.readouterr().err == (
        "rank 1 was ended by SIGKILL; the machine may have run out of memory\n"
    )


def test_a_rank_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "PATIENCE", (0.0, 0.0))
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(f'{folder}/ready_{rank}', 'w')\n"
        "while not os.path.exists(f'{folder}/ready_1'): time.sleep(0.01)\n"
        "if rank == 0: sys.exit(3)\n"
        "time.sleep(100)"
    )
    assert launcher.launch(command(tmp_path, code), 2) == 3


@pytest.mark.parametrize("number", launcher.FORWARDED)
def test_signals_reach_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    """The ranks signal the launcher, which is this process, when both of them are ready."""
    code = (
        "seen = []\n"
        f"signal.signal({int(number)}, lambda n, _: seen.append(n))\n"
        "open(f'{folder}/ready_{rank}', 'w')\n"
        "while not all(os.path.exists(f'{folder}/ready_{r}') for r in (0, 1)): time.sleep(0.01)\n"
        f"if rank == 0: os.kill(os.getppid(), {int(number)})\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.1); sys.exit(len(seen) - 1)"
    )
    before = signal.getsignal(number)
    assert launcher.launch(command(tmp_path, code), 2) == 0
    assert signal.getsignal(number) is before


def test_no_rank_outlives_the_launcher(tmp_path: Path) -> None:
    """Killed by SIGKILL, the launcher cannot end its ranks: the kernel does."""
    code = "time.sleep(100)"
    start = f"from gipo_megatron import launcher; launcher.launch({command(tmp_path, code)!r}, 2)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", start], env=environment) as process:
        pids: list[int] = []
        while len(pids) < 2:
            files = [tmp_path / rank for rank in ("0", "1")]
            texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
            pids = [int(text) for text in texts if text]
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    while not all(gone(pid) for pid in pids):
        time.sleep(0.01)


WORDS = [
    (["--nproc", "2", "a=1"], 2, ["a=1"]),
    (["a=1", "--nproc=3"], 3, ["a=1"]),
    (["a=1"], 0, ["a=1"]),
]


@pytest.mark.parametrize(("words", "count", "left"), WORDS)
def test_nproc_is_taken_from_the_words(
    words: list[str], count: int, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = list(words)
    assert (launcher.take_nproc(given), given) == (count, left)


@pytest.mark.parametrize(
    "words",
    [["--nproc"], ["--nproc", "0"], ["--nproc=many"], ["--nproc=-1"], ["--nproc=1", "--nproc=2"]],
)
def test_no_number_of_processes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="--nproc needs a number"):
        launcher.take_nproc(words)


def test_nproc_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        launcher.take_nproc(["--nproc", "2"])


def test_train_and_evaluate_are_started_again_as_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started: list[tuple[list[str], int]] = []

    def launch(words: list[str], processes: int) -> int:
        started.append((words, processes))
        return 7

    monkeypatch.setattr(launcher, "launch", launch)
    for name in ("train", "evaluate"):
        assert cli.main([name, "--nproc", "2", "recipe=x"]) == 7
        words = [sys.executable, "-P", "-m", "gipo_megatron.cli", name, "recipe=x"]
        assert started.pop() == (words, 2)
