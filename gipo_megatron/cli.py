"""The `gipo` command. Each name in COMMANDS is a module of gipo_megatron/commands."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from gipo_megatron import environment
from gipo_megatron.errors import UserError
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
WITHOUT_WORDS = ("doctor",)  # commands that do something useful without any word; others print help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a mistake of the user (printed without a
    traceback), 130 stopped by Ctrl-C."""
    name, *words = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in HELP:
        print(usage())
        return 0
    stopped = "stopped"
    try:
        if name not in COMMANDS:
            raise UserError(
                f"unknown command {name!r}", where="command line", fix=suggest(name, COMMANDS)
            )
        environment.set_defaults()  # before a command imports torch
        command = importlib.import_module(f"gipo_megatron.commands.{name.replace('-', '_')}")
        stopped = getattr(command, "STOPPED", stopped)
        if any(word in HELP for word in words) or not (words or name in WITHOUT_WORDS):
            print(command.__doc__)
            return 0
        return command.main(words)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        return 130


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
            "several processes: torchrun --nproc-per-node N -m gipo_megatron.cli train recipe=NAME",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
