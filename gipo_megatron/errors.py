"""Errors that a user can fix: what is wrong, where (file, key), how to fix it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import Repr

LONGEST = 600  # characters of a line: a value of any length may stand in it
_repr = Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 4, 100, 100, 100


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
