"""The commands of `gipo`, one module each.

A module's docstring is its help; `main(argv)` returns the exit code. `STOPPED`, where a module has
it, is printed after Ctrl-C.
"""

from __future__ import annotations

from pathlib import Path


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: inside an installed package, or beside the package
    in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


RECIPES = recipes_folder()
