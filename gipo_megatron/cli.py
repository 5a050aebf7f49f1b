"""The `gipo` command. Each name in COMMANDS is a module of gipo_megatron/commands."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial

from gipo_megatron import environment, launcher
from gipo_megatron.errors import UserError, system_errors
from gipo_megatron.recipe.problems import fail, suggest

COMMANDS = {
    "train": "train a model as a recipe describes it",
    "evaluate": "compare policies on held-out prompts",
    "recipe": "list, show, check and compare recipes",
    "plan": "estimate memory, layout and time of a recipe without a GPU",
    "doctor": "show what this machine has, and whether a recipe can run on it",
    "convert": "convert checkpoints to Hugging Face folders and back",
    "plot": "write a table, figures and a report of run folders",
    "prepare-data": "check preference, prompt or SFT data, and write them cleaned",
}
HELP = ("-h", "--help")
LAUNCHED = ("train", "evaluate")  # commands that --nproc starts several processes of
WITHOUT_WORDS = ("doctor",)  # commands that do something useful without any word; others print help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, as `run` does."""
    return run(partial(_command, sys.argv[1:] if argv is None else list(argv)))


def run(main: Callable[[], int | None]) -> int:
    """Run a command or a tool on any terminal and return its exit code: its own, 0 for None; 2 for
    a mistake of the user and for what the operating system refuses, printed without a traceback;
    130 for Ctrl-C; 141 where the reader of its output has gone."""
    environment.set_output()
    try:
        with system_errors():
            code = main() or 0
            sys.stdout.flush()
        return code
    except UserError as error:
        fail(error)
    except BrokenPipeError:
        environment.drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            environment.emit(str(stop) or "stopped")
        return 130


def _command(argv: list[str]) -> int:
    name, *words = argv or ["--help"]
    if name in HELP:
        print(usage())
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"unknown command {name!r}", where="command line", fix=suggest(name, COMMANDS)
        )
    help_wanted = any(word in HELP for word in words) or not (words or name in WITHOUT_WORDS)
    if name in LAUNCHED and not help_wanted and (processes := launcher.take_nproc(words)):
        # -P: as for the script launch/train.py, the current folder hides no package
        rank = [sys.executable, "-P", "-m", "gipo_megatron.cli", name, *words]
        return launcher.launch(rank, processes)
    environment.set_defaults()  # before a command imports torch
    command = importlib.import_module(f"gipo_megatron.commands.{name.replace('-', '_')}")
    if help_wanted:
        print(command.__doc__)
        return 0
    try:
        return command.main(words)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(getattr(command, "STOPPED", "")) from None


def usage() -> str:
    """Return the list of commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "gipo COMMAND [word …]      (gipo COMMAND --help explains a command)",
            "",
            *lines,
            "",
            "several processes on this machine: gipo train --nproc N recipe=NAME …",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
