"""A complete small recipe in a folder of its own, on top of the repository's base recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gipo_megatron.recipe.compose import compose, load_components
from gipo_megatron.recipe.problems import Problem, RecipeErrors
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.recipe.source import Block

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SMALL = """\
defaults: [base/gipo, model/tiny, hardware/cpu]
models:
  actor: {load: random}
  reward: {load: random}
data: {format: planted, max_length: 64, max_response: 16}
run: {dir: runs/small, steps: 3}
"""

# here, since a package that the components import may draw from a global generator
load_components(Block({}, "tests"))


def write(folder: Path, **files: str) -> Path:
    """NAME.yaml for each; the first one's path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


def small(folder: Path, *words: str, world: int = 1, text: str = SMALL) -> Recipe:
    return compose([f"recipe={write(folder, small=text)}", *words], RECIPES, world=world)


def problems(folder: Path, *words: str, world: int = 1, text: str = SMALL) -> list[Problem]:
    with pytest.raises(RecipeErrors) as caught:
        small(folder, *words, world=world, text=text)
    return list(caught.value.problems)
