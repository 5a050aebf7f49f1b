"""Runs a script in processes forked from a server that has imported torch and Megatron
(tools/faults/world.py). Tests of the launchers themselves start a fresh Python, as a user does."""

from __future__ import annotations

from pathlib import Path

from tools.faults.trial import Lost
from tools.faults.world import CONTEXT, ROOT, Finished, world

CONTEXT.set_forkserver_preload(["tests.preloaded"])

__all__ = ["ROOT", "Finished", "run"]


def run(
    script: Path, *arguments: str, ranks: int = 1, folder: Path = ROOT, timeout: float = 560
) -> Finished:
    """Run `script arguments…` on `ranks` processes of one world, in `folder`.

    Raises AssertionError with the end of their output when they take longer than `timeout`
    seconds. When one rank fails, the others are ended.
    """
    try:
        with world(script, *arguments, ranks=ranks, folder=folder) as started:
            return started.wait(timeout, patient=False)
    except Lost as late:
        raise AssertionError(str(late)) from None
