"""Errors that a user can fix: what is wrong, where (file, key), how to fix it."""

from __future__ import annotations


class UserError(ValueError):
    """Mistake in a recipe, a file or the command line. Printed without a traceback; exit code 2."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)
