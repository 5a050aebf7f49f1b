"""The watch of one rank over the next one, whose signs the tests write."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from gipo_megatron.megatron import watch
from gipo_megatron.megatron.watch import Phases, Watch

SIGN = json.dumps([5, "update after step 3", "all_reduce (x.py:7)", "process 9 on node7"])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.Store]:
    """The store of a world of two, of which this process is rank 0."""
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(host.port),
    }.items():
        monkeypatch.setenv(name, value)
    yield dist.PrefixStore("gipo_megatron/watch/0", host)


def ended(timeout: float) -> threading.Event:
    """Watch until this rank leaves; the test hangs where it does not."""
    left = threading.Event()
    with Watch(timeout, left.set):
        assert left.wait(60)
    return left


def test_a_silent_rank_is_named_with_its_last_phase(
    store: dist.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.set("1", SIGN)
    ended(0.2)
    assert capsys.readouterr().err == (
        "rank 1 hangs: no sign of life for 0.2 s; last phase: update after step 3, in all_reduce"
        " (x.py:7); process 9 on node7\n"
        "  where: parallel.timeout: 0.2\n"
        f"  fix:   {watch.FIX}\n"
    )


def test_a_rank_that_never_came(store: dist.Store, capsys: pytest.CaptureFixture[str]) -> None:
    ended(0.2)
    assert capsys.readouterr().err.startswith("rank 1 has not started: no sign of life for 0.2 s")


def test_only_the_rank_that_finds_it_prints(
    store: dist.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.set("failure", "1\nrank 0 hangs")
    ended(0.2)
    assert capsys.readouterr().err == ""


def test_a_rank_that_has_ended_is_not_silent(store: dist.Store) -> None:
    store.set("1", "ended")
    left = threading.Event()
    with Watch(0.02, left.set):
        while not store.check(["0"]) or json.loads(store.get("0"))[0] < 60:  # three time-outs
            assert not left.wait(0.01)
    assert store.get("0") == b"ended"


def test_signs_have_the_phase_and_the_line(store: dist.Store) -> None:
    phases = Phases()
    with Watch(60):
        phases.log(3, {})
        phases.phase("rollout")
        while not store.check(["0"]) or json.loads(store.get("0"))[1] == "start":
            pass
        _, phase, line, process = json.loads(store.get("0"))
    assert phase == "rollout after step 3"
    assert re.fullmatch(r"\w+ \(\w+\.py:\d+\)", line) and re.fullmatch(
        r"process \d+ on .+", process
    )


def test_an_exchange_that_is_late(store: dist.Store) -> None:
    """The words of gloo's error are those that torch gives here."""
    with Watch(60) as watching:
        store.set("1", SIGN)
        while not store.check(["0"]):
            pass
        error = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation")
        message = watching.late(error)
        assert watching.late(RuntimeError("Connection closed by peer")) == ""
    assert message.startswith("an exchange between ranks did not end in 90 s; last phases: ")
    assert (
        "rank 1: update after step 3, in all_reduce (x.py:7)" in message and "rank 0: " in message
    )


def test_one_process_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = threading.active_count()
    with Watch(0.1) as watching:
        assert threading.active_count() == before
        assert watching.late(RuntimeError("timed out")) == ""
