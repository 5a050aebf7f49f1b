"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gipo_megatron.errors import UserError


class Mismatch(UserError):
    """A written model that differs from its source."""


def refuse_existing(out: Path) -> None:
    """Raise UserError where `out` exists or cannot be written, before anything is read."""
    if out.exists():
        raise UserError(
            f"{out} exists already", where="out", fix="choose another folder, or remove it first"
        )
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {parent}: {error.strerror}",
            where="out",
            fix="choose a folder you may write to",
        ) from None


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield OUT.partial, which becomes OUT when the block ends without an error, replacing an older
    OUT.

    After a full disk, an error or Ctrl-C it is removed; after a Mismatch it stays, as OUT.mismatch.
    """
    work, bad, old = (
        out.with_name(f"{out.name}.{word}") for word in ("partial", "mismatch", "old")
    )
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        shutil.rmtree(old, ignore_errors=True)  # of a kill at this place
        if out.exists():
            out.rename(old)
        work.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except Mismatch as error:
        shutil.rmtree(bad, ignore_errors=True)
        work.rename(bad)
        raise Mismatch(error.what, where=str(bad), fix=error.fix) from None
    except UserError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(
            error.what, where=error.where.replace(str(work), str(out)), fix=error.fix
        ) from None
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(
            f"cannot write {out}: {error.strerror or error}",
            where="out",
            fix="free some space, or choose another disk; nothing was left there",
        ) from None
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
