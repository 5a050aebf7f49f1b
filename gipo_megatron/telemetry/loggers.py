"""Loggers of a recipe's `run.loggers`: TensorBoard, Weights & Biases, and the sinks of sinks.py."""

from __future__ import annotations

import difflib
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gipo_megatron.environment import drop_output, emit
from gipo_megatron.errors import UserError
from gipo_megatron.files import write_text
from gipo_megatron.screen import shown
from gipo_megatron.telemetry.console import Headline
from gipo_megatron.telemetry.sinks import Console, Jsonl, LogFile, Sink

LOGGERS = ("console", "jsonl", "tensorboard", "wandb")
TEXT_SAMPLES = 4  # samples a step shown in TensorBoard and W&B; samples.jsonl has all


def make_sinks(
    loggers: Sequence[str],
    run_dir: str | Path,
    total_steps: int,
    *,
    name: str,
    headline: Headline,
    config: Mapping[str, Any],
) -> list[Sink]:
    """Return the sinks of `run.loggers`. metrics.jsonl, samples.jsonl and log.txt are always
    written: reports read them.

    `name` and `config` (the expanded recipe) are for W&B; `headline` is the algorithm's. All but
    the .jsonl files are guarded. Raises UserError for an unknown logger.
    """
    for logger in loggers:
        if logger not in LOGGERS:
            close = difflib.get_close_matches(logger, LOGGERS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"unknown logger {logger!r}",
                where="run.loggers",
                fix=f"{hint}loggers are {', '.join(LOGGERS)}",
            )
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    guarded: dict[str, Sink] = {"log.txt": LogFile(folder / "log.txt", total_steps, headline)}
    if "tensorboard" in loggers:
        guarded["tensorboard"] = TensorBoard(folder / "tensorboard")
    if "wandb" in loggers:
        guarded["wandb"] = Wandb(folder, name, config)
    if "console" in loggers:
        guarded["console"] = Console(total_steps, name, headline)
    return [Jsonl(folder), *(Guarded(label, sink) for label, sink in guarded.items())]


class Guarded(Sink):
    """A sink that no run depends on: any failure but UserError switches it off, with a warning."""

    def __init__(self, label: str, sink: Sink) -> None:
        self._label, self._sink = label, sink

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._call(self._sink.log, step, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], kind: str = "samples") -> None:
        self._call(self._sink.samples, step, rows, kind)

    def alert(self, step: int, message: str) -> None:
        self._call(self._sink.alert, step, message)

    def phase(self, name: str) -> None:
        self._call(self._sink.phase, name)

    def resume(self, step: int) -> None:
        self._call(self._sink.resume, step)

    def close(self) -> None:
        self._call(self._sink.close)

    def _call(self, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except UserError:
            raise
        # other libraries raise what they like; rich ends the program where its reader has gone
        except (Exception, SystemExit) as error:
            failed, self._sink = self._sink, Sink()
            console = self._label == "console"
            gone = console and isinstance(error, BrokenPipeError | SystemExit)
            why = "nothing reads it any more" if gone else _first_line(error)
            if console and isinstance(error, OSError | SystemExit):
                drop_output()
            warn(f"logger {self._label} is switched off: {why}")
            with suppress(Exception):
                failed.close()


def warn(message: str) -> None:
    emit(shown(f"warning: {message}"))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _without_tensorboard(failed: threading.ExceptHookArgs) -> None:
    """Show the error of a thread, but not that of TensorBoard's writer: its next call raises it."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


class TensorBoard(Sink):
    """Event files; after a resume TensorBoard hides the later steps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._purge: int | None = None
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events().add_scalar(name, value, step)
        self._events().flush()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], kind: str = "samples") -> None:
        for i, row in enumerate(rows[:TEXT_SAMPLES]):
            text = "\n\n".join(f"{key}: {value}" for key, value in row.items())
            self._events().add_text(f"{kind}/{i}", _indented(text), step)

    def alert(self, step: int, message: str) -> None:
        self._events().add_text("alerts", _indented(message), step)

    def resume(self, step: int) -> None:
        self.close()
        self._purge = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _events(self) -> Any:
        if self._writer is None:
            # slow to import, so only when it is used
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _without_tensorboard
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge)
        return self._writer


def _indented(text: str) -> str:
    """Return a block that Markdown shows unchanged."""
    return "\n".join("    " + line for line in shown(text).splitlines())


class Wandb(Sink):
    """Weights & Biases, all files inside the run folder. Never prompts: without a login (or with
    WANDB_MODE=offline) it runs offline; upload later with `wandb sync --append`.

    The folder keeps the run's id and every row has its step, so a resumed run continues its curves;
    W&B drops rows that were logged before.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._folder, self._name, self._config = folder, name, config
        self._run: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], kind: str = "samples") -> None:
        import wandb

        columns = list(rows[0])
        data = [[row[c] for c in columns] for row in rows[:TEXT_SAMPLES]]
        self._run.log({kind: wandb.Table(columns=columns, data=data)}, step=step)

    def alert(self, step: int, message: str) -> None:
        if self._run.settings.mode == "online":
            self._run.alert(title=self._name, text=message)

    def resume(self, step: int) -> None:
        self.close()
        if step == 0:  # a new run from now on: W&B cannot remove rows
            (self._folder / "wandb_id").unlink(missing_ok=True)
        self._run = self._start()

    def close(self) -> None:
        if self._run is None:
            return
        import wandb

        run, self._run = self._run, None
        try:
            run.finish()
        finally:
            wandb.teardown()  # at the program's end it prints a traceback if its process has died

    def _start(self) -> Any:
        # instead of the home folder, which on a cluster may be full, slow or read-only
        os.environ.setdefault("WANDB_CACHE_DIR", str(self._folder / "wandb"))
        os.environ.setdefault("WANDB_DATA_DIR", str(self._folder / "wandb"))
        # at the end of a run without a network; `wandb sync` uploads the rest
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")
        os.environ.setdefault("WANDB_SILENT", "true")  # of the login
        fix = "set WANDB_MODE=offline, or remove wandb from run.loggers"
        try:
            import wandb
        except Exception as error:
            what = f"wandb cannot be imported: {_first_line(error)}"
            raise UserError(
                what, where="run.loggers", fix="pip install wandb, or remove it from run.loggers"
            ) from error
        mode = os.environ.get("WANDB_MODE")
        try:
            online = mode in (None, "online") and wandb.login(prompt=False, verify=False)
            if mode == "online" and not online:
                raise ValueError("there is no API key; run `wandb login` once")
            return self._init(mode or ("online" if online else "offline"), online)
        except Exception as error:  # W&B raises its own, its libraries' and Python's
            what = f"W&B did not start: {_first_line(error)}"
            if mode is not None:
                raise UserError(what, where="run.loggers", fix=fix) from error
            warn(f"{what}; the run goes on with WANDB_MODE=offline")
            wandb.teardown()  # forgets the run that did not start, which has the same id
            return self._init("offline", False)

    def _init(self, mode: str, online: bool) -> Any:
        import wandb

        identity = self._folder / "wandb_id"
        resumed = identity.exists()
        if not resumed:
            write_text(identity, uuid.uuid4().hex[:12] + "\n")
        return wandb.init(
            dir=str(self._folder),
            project=os.environ.get("WANDB_PROJECT", "gipo"),
            id=identity.read_text(encoding="utf-8").strip(),
            name=self._name,
            config=dict(self._config),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if resumed and online else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                init_timeout=30,
            ),
        )
