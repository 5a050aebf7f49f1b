"""Loggers that fail: the run goes on without them, or offline."""

from __future__ import annotations

import builtins
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.telemetry import loggers
from gipo_megatron.telemetry.loggers import Guarded, Wandb, make_sinks
from gipo_megatron.telemetry.sinks import Console, Jsonl, Sink


class Broken(Sink):
    """Fails at `method`; counts the calls."""

    def __init__(self, method: str, error: BaseException) -> None:
        self.calls: list[str] = []
        self._method, self._error = method, error

    def __getattribute__(self, name: str) -> Any:
        if name not in METHODS:
            return super().__getattribute__(name)

        def call(*arguments: object) -> None:
            self.calls.append(name)
            if name == self._method:
                raise self._error

        return call


METHODS: Mapping[str, tuple[Any, ...]] = {
    "resume": (0,),
    "log": (1, {"x": 1.0}),
    "samples": (1, [{"a": "b"}], "held_out"),
    "alert": (1, "!"),
    "phase": ("rollout",),
    "close": (),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_logger_that_fails_is_switched_off_with_one_warning(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = Broken(method, RuntimeError("no space\nmore"))
    sink = Guarded("tensorboard", inner)
    for _ in range(2):
        for name, arguments in METHODS.items():
            getattr(sink, name)(*arguments)
    before = list(METHODS)[: list(METHODS).index(method) + 1]
    assert inner.calls == [*before, "close"]  # then it is closed, and left alone
    warning = "warning: logger tensorboard is switched off: RuntimeError: no space\n"
    assert capsys.readouterr() == ("", warning)


def test_a_mistake_of_the_user_is_not_guarded() -> None:
    with pytest.raises(UserError):
        Guarded("wandb", Broken("resume", UserError("no key"))).resume(0)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), SystemExit(1)])
def test_a_reader_that_leaves_ends_the_console_and_not_the_run(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich raises the second."""
    dropped: list[int] = []
    monkeypatch.setattr(loggers, "drop_output", lambda: dropped.append(1))
    sink = Guarded("console", Broken("log", error))
    sink.log(1, {})
    sink.log(2, {})
    assert dropped == [1]
    said = "warning: logger console is switched off: nothing reads it any more\n"
    assert capsys.readouterr().err == said


def test_the_error_of_tensorboards_thread_is_not_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The next call of its writer raises it, and that is the warning."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    error = OSError(28, "No space left on device")
    for thread in (object.__new__(_AsyncWriterThread), loggers.threading.Thread(name="other")):
        failed = loggers.threading.ExceptHookArgs((OSError, error, None, thread))
        loggers._without_tensorboard(failed)
    assert capsys.readouterr().err.count("Exception in thread") == 1


def test_only_the_console_is_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe of another logger may break, and its file be on a full disk."""
    dropped: list[int] = []
    monkeypatch.setattr(loggers, "drop_output", lambda: dropped.append(1))
    for error in (BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")):
        Guarded("wandb", Broken("log", error)).log(1, {})
        assert dropped == []
    Guarded("console", Broken("log", OSError(28, "No space left on device"))).log(1, {})
    assert dropped == [1]


def test_richs_console_without_a_reader(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change of what rich raises there shows here."""
    dropped: list[int] = []
    monkeypatch.setattr(loggers, "drop_output", lambda: dropped.append(1))
    gone, output = os.pipe()
    os.close(gone)
    with open(output, "w", encoding="utf-8", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)  # rich redirects its descriptor
        sink = Guarded("console", Console(3, "run", (), live=False))
        sink.log(1, {"loss": 1.0})
        sink.log(2, {"loss": 1.0})
        monkeypatch.undo()
    assert dropped == [1] and "nothing reads it" in capsys.readouterr().err


def test_all_loggers_but_the_rows_are_guarded(tmp_path: Path) -> None:
    names = ["console", "tensorboard", "wandb"]
    first, *others = make_sinks(names, tmp_path, 1, name="run", headline=(), config={})
    assert isinstance(first, Jsonl) and len(others) == 4
    assert all(isinstance(sink, Guarded) for sink in others)


class FakeWandb(types.ModuleType):
    """Stands for the package: `login` and each `init` give or raise what they are told."""

    def __init__(self, login: Any, *inits: Any) -> None:
        super().__init__("wandb")
        self.modes: list[str] = []
        self.torn_down = 0
        self._login, self._inits = login, list(inits)

    def login(self, **how: Any) -> bool:
        assert how == {"prompt": False, "verify": False}  # no question, no network
        return _given(self._login)

    def init(self, *, mode: str, **_: Any) -> object:
        self.modes.append(mode)
        return _given(self._inits.pop(0))

    def teardown(self) -> None:
        self.torn_down += 1

    def Settings(self, **_: Any) -> None:
        return None


def _given(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


@pytest.fixture
def wandb(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[FakeWandb, Callable[[], None]]]:
    for name in ("MODE", "FINISH_TIMEOUT", "FINISH_TIMEOUT_RAISES", "SILENT", "CACHE_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", "")
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))

    def build(login: Any, *inits: Any) -> tuple[FakeWandb, Callable[[], None]]:
        fake = FakeWandb(login, *inits)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        sink = Wandb(tmp_path, "run", {})
        return fake, lambda: sink.resume(0)

    return build


FAULTS = [
    RuntimeError("no network\nGo stack"),
    TimeoutError("60 s"),
    ValueError("API key must have 40 characters"),
    OSError(113, "No route to host"),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["login", "init"])
def test_wandb_goes_on_offline_after_any_failure(
    where: str, error: Exception, wandb: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, start = wandb(*([error] if where == "login" else [True, error]), "run")
    start()
    assert fake.modes == ["online", "offline"][where == "login" :] and fake.torn_down == 1
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "Go stack" not in warning
    assert warning.endswith("; the run goes on with WANDB_MODE=offline\n")
    assert str(error).split("\n")[0] in warning


def test_wandb_without_a_key_is_offline_without_a_warning(
    wandb: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, start = wandb(False, "run")
    start()
    assert fake.modes == ["offline"] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("given", [(False,), (RuntimeError("no key"),), (True, OSError(1, "x"))])
def test_wandb_that_was_asked_to_be_online_is_refused(
    given: tuple[Any, ...], wandb: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, start = wandb(*given)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError) as error:
        start()
    assert "WANDB_MODE=offline" in error.value.fix and error.value.where == "run.loggers"


@pytest.mark.parametrize("error", [ImportError("No module named 'wandb'"), TypeError("protobuf")])
def test_wandb_that_cannot_be_imported(
    error: Exception, wandb: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, start = wandb(True)
    inner = builtins.__import__

    def refuse(name: str, *arguments: Any, **how: Any) -> Any:
        if name == "wandb":
            raise error
        return inner(name, *arguments, **how)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="wandb cannot be imported") as refused:
        start()
    assert "pip install wandb" in refused.value.fix
