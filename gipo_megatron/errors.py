"""Errors that a user can fix: what is wrong, where (file, key), how to fix it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import Repr

LONGEST = 600  # characters of a line: a value of any length may stand in it
_repr = Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 4, 100, 100, 100

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Mistake in a recipe, a file or the command line. Printed without a traceback; exit code 2."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        # `args` stays what the class was called with, so that other ranks can be sent the error
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(_cut(line) for part in lines for line in part.split("\n"))


def short(value: object) -> str:
    """Return repr(value), shortened where it is long or deep."""
    return _repr.repr(value)


def _cut(line: str) -> str:
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]} … {line[-half:]}"


class SamplerLost(UserError):
    """The end of a server that draws responses. It comes before anything has changed: a run can
    save, and continue from there."""


def refusal(error: OSError) -> UserError:
    """Return what the operating system refused, as on a full disk, as an error of the user."""
    fix = "free some space" if error.errno in FULL else "give the rights for it, or another place"
    where = error.filename2 or error.filename or ""
    return UserError(f"the system refuses: {error.strerror or error}", where=str(where), fix=fix)


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise an error of the operating system as a UserError; a reader of the output that has gone
    is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise refusal(error) from error


def system_error(error: BaseException | None) -> OSError | None:
    """Return the operating system's error behind a library's; None where there is none."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def library_errors(what: str, *, where: str = "", fix: str = "") -> Iterator[None]:
    """Raise every error of a library inside the block as one UserError with its kind and first
    line. What a library raises is not part of its interface, so no list of kinds is complete."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers package is no Exception
        line = str(error).strip().split("\n")[0]
        reason = f"{type(error).__name__}: {line}" if line else type(error).__name__
        raise UserError(f"{what}: {reason}", where=where, fix=fix) from error
