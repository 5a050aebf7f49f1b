"""The step folders of a run: which stay, which go, and the links to them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from gipo_megatron.weights.checkpoints import steps

_LEFTOVER = re.compile(r"step_\d+(\.tmp|\.old)?")


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` steps and those that a link in DIR or beside it points
    to."""
    linked = {
        path.resolve()
        for folder in (directory, directory.parent)
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_symlink()
    }
    for _, path in steps(directory)[: -keep or None]:
        if path.resolve() not in linked:
            _remove(path)


def _remove(path: Path) -> None:
    """meta.json goes first: a folder that a kill leaves half-removed is no checkpoint."""
    (path / "meta.json").unlink(missing_ok=True)
    shutil.rmtree(path)


def discard_after(directory: Path, step: int) -> None:
    """Remove the checkpoints after `step`, from which a run continues, and unfinished folders.
    Rank 0 only."""
    if not directory.is_dir():
        return
    keep = {path for number, path in steps(directory) if number <= step}
    for path in directory.iterdir():
        if path not in keep and path.is_dir() and _LEFTOVER.fullmatch(path.name):
            _remove(path)


def link(name: Path, target: Path) -> None:
    """Make `name` a relative symlink to `target`, replacing an older link in one step. Rank 0
    only."""
    fresh = name.with_name(name.name + ".tmp")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, name.parent))
    os.replace(fresh, name)
