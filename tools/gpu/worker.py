"""Runs parts of tools/gpu_verify.py: python -m tools.gpu.worker SETTINGS

Reads {"part", "run", "seconds"} lines from stdin. Prints one JSON line a figure to what was stdout,
then {"end", "reason"}. All else that is printed goes to stderr, which is the parent's log. Ends
when stdin does: a worker does not outlive its parent.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO, Any

from gipo_megatron import environment
from tools.gpu.bench import Bench, Figure, NotRun


def main(settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("once")
    environment.set_defaults()  # before torch is imported
    if settings["device"] == "cuda" and (mistake := no_cuda()):
        say(answers, {"mistake": mistake})
        return
    say(answers, {"ready": True})
    bench = Bench.of(settings)
    for order in orders():
        bench.deadline = time.monotonic() + order["seconds"]
        for message in answer(order["run"], bench):
            say(answers, message)


def say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message, ensure_ascii=False) + "\n")
    answers.flush()


def no_cuda() -> str:
    """Return the reason why no GPU can be used; "" where one can."""
    import torch

    if torch.cuda.is_available():
        return ""
    return (
        f"torch {torch.__version__} finds no CUDA device; to try this tool on a CPU: --device cpu"
        " --tiny"
    )


def orders() -> Iterator[dict[str, Any]]:
    """Lines of stdin, read by a thread, which ends the process with its parent even in the midst of
    a part."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def answer(run: str, bench: Bench) -> Iterator[dict[str, Any]]:
    """The figures of one part as messages, and how it ended. The device's memory is freed in
    between."""
    end: dict[str, Any] = {"end": "done", "reason": ""}
    print(f"----- {run}", file=sys.stderr, flush=True)
    try:
        module, function = run.split(":")
        for figure in getattr(importlib.import_module(module), function)(bench):
            yield message(figure)
    except NotRun as reason:
        end = {"end": "not run", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        end = {"end": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
    try:
        for figure in bench.free():
            yield message(figure)
    except RuntimeError:  # an illegal access leaves no usable device behind
        traceback.print_exc()
        end["broken"] = True
    yield end


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def message(figure: Figure) -> dict[str, Any]:
    fields = asdict(figure)
    return {"figure": fields.pop("name"), **fields}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
