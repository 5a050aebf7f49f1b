"""What every recipe expands to, as text that a review can read: `python -m tests.golden` writes it
anew.

A base recipe is listed in full, any other by what differs from the recipe it builds on, so that a
changed default shows once and not forty times. `-` stands for a key that a recipe no longer has,
because it exchanged the component.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gipo_megatron.evaluation import recipe as evaluation_recipe
from gipo_megatron.evaluation.recipe import EvaluationRecipe, compose_evaluation, is_evaluation
from gipo_megatron.recipe.compose import compose, load_components
from gipo_megatron.recipe.files import Files, find_recipe, recipe_names
from gipo_megatron.recipe.needs import needed, pruned
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.recipe.source import Block, dump_value, leaves, plain
from gipo_megatron.recipe.validate import Validation
from tests.smollm import beside_the_model

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FILE = Path(__file__).resolve().parent / "golden_recipes.txt"
HEADER = "# Written by `python -m tests.golden`: read the difference before you commit it.\n"


def bases() -> list[str]:
    return [name for name in recipe_names(RECIPES, fragments=True) if name.startswith("base/")]


def parent_of(name: str) -> str:
    """The recipe, or base recipe, that a recipe builds on: the first of its defaults."""
    return str(plain(Files(RECIPES).own(find_recipe(name, RECIPES)).children["defaults"])[0])


def _is_evaluation(name: str) -> bool:
    return is_evaluation([f"recipe={name}"], RECIPES)


def read_by(cls: type, tree: Block) -> Block:
    """The keys that a recipe of this kind reads."""
    if cls is EvaluationRecipe:
        return evaluation_recipe.pruned(tree)
    return pruned(tree, needed(tree))


def values(name: str) -> dict[str, str]:
    """key.path -> its value as YAML, expanded; of a base recipe with ??? and ${…} as they stand."""
    if name.startswith("base/"):
        written = Files(RECIPES).load(find_recipe(name, RECIPES))
        cls = EvaluationRecipe if _is_evaluation(name) else Recipe
        complete, _ = Validation().block(written, cls)
        tree = read_by(cls, complete)
    elif _is_evaluation(name):
        tree = compose_evaluation([f"recipe={name}"], RECIPES).tree
    else:
        tree = compose([f"recipe={name}"], RECIPES).tree
    return {".".join(path): dump_value(leaf.value) for path, leaf in leaves(tree)}


def sections() -> Iterator[tuple[str, list[str]]]:
    """(heading, lines) of every base, then of every recipe."""
    names = [*bases(), *recipe_names(RECIPES)]
    expanded = {name: values(name) for name in names}
    for name, found in expanded.items():
        if name.startswith("base/"):
            yield name, [f"{key} = {value}" for key, value in found.items()]
            continue
        parent = parent_of(name)
        differs = [
            f"{key} = {value}" for key, value in found.items() if expanded[parent].get(key) != value
        ]
        yield (
            f"{name}, from {parent}",
            differs + [f"{key} = -" for key in expanded[parent] if key not in found],
        )


def text() -> str:
    with beside_the_model():
        found = list(sections())
    return HEADER + "".join(
        f"\n[{heading}]\n" + "".join(f"{line}\n" for line in lines) for heading, lines in found
    )


if __name__ == "__main__":
    load_components(Block({}, "golden"))
    FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {FILE}")
