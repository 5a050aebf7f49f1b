"""Look at recipes without starting anything.

python tools/recipe.py list                          names, first line of each
python tools/recipe.py show NAME [key=value …]       everything expanded, with the file and line of
each value
python tools/recipe.py check [NAME…] [key=value …]   all problems at once; no name: every recipe;
world=64, with=hardware/…
python tools/recipe.py diff A B [key=value …]        exactly the keys that differ
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.recipe import EvaluationRecipe, compose_evaluation, is_evaluation
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.files import find_recipe, recipe_names
from gipo_megatron.recipe.problems import RecipeErrors, fail
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.recipe.source import Block, Node, dump_value, plain

ROOT = Path(__file__).resolve().parent.parent / "recipes"


def composed(name: str, settings: Sequence[str]) -> Recipe | EvaluationRecipe:
    """Of launch/train.py, or of launch/evaluate.py where its name says so."""
    argv = [f"recipe={name}", *settings]
    return (compose_evaluation if is_evaluation(argv, ROOT) else compose)(argv, ROOT)


def summary(recipe: Recipe | EvaluationRecipe) -> str:
    """`ok hh_gipo: 8 processes = tensor 4 × pipeline 1 × data 2; …`"""
    parallel = recipe.parallel
    shares = (
        f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × data {recipe.data_parallel}"
    )
    world = f"{recipe.world} process{'es' if recipe.world > 1 else ''} = {shares}"
    if isinstance(recipe, EvaluationRecipe):
        pairs = f"{recipe.subject} against {', '.join(recipe.opponents)}"
        prompts = sum(task.prompts for task in recipe.tasks)
        return (
            f"ok {recipe.name}: evaluation; {world}; {pairs}; {len(recipe.tasks)} tasks, at most"
            f" {prompts} prompts; {recipe.judge['name']}"
        )
    batch = recipe.batch
    slots = batch.minibatch // (recipe.data_parallel * batch.micro_batch)
    step = (
        f"minibatch {batch.minibatch} = data {recipe.data_parallel} × {slots} micro-batches of"
        f" {batch.micro_batch}"
    )
    if "critic" in recipe.trained:
        rows = batch.prompts * batch.responses
        step = (
            f"{batch.prompts} prompts × {batch.responses} responses = {rows // batch.minibatch}"
            f" minibatches; {step}"
        )
    return f"ok {recipe.name}: {recipe.algorithm['name']}; {world}; {step}"


def check(names: Sequence[str], settings: Sequence[str]) -> None:
    """Prints a line per sound recipe, and all problems of the others. Raises UserError when there
    were any.

    Among all recipes, those that take their architecture from weights which are not on this machine
    are no problem.
    """
    failed: list[UserError] = []
    for name in names or recipe_names(ROOT):
        try:
            recipe = composed(name, settings)
        except RecipeErrors as error:
            if names or any(not problem.absent for problem in error.problems):
                failed.append(error)
            else:
                print(f"-- {name}: not checked, no weights to read the architecture from")
            continue
        except UserError as error:
            failed.append(error)
            continue
        print(summary(recipe))
        for warning in recipe.warnings:
            print("  warning: " + "; ".join(line.strip() for line in warning.splitlines()))
    if failed:
        raise UserError("\n".join(str(error) for error in failed))


def differences(a: Node, b: Node, path: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    """(key, value in a, value in b) of every key that differs; a component of another name is one
    row."""
    if isinstance(a, Block) and isinstance(b, Block):
        if path[:1] == ("algorithm",) and _name(a) != _name(b):
            return [(".".join(path), _compact(a), _compact(b))]
        rows = []
        for key in dict.fromkeys([*a.children, *b.children]):
            one, other = a.children.get(key), b.children.get(key)
            if one is None or other is None:
                rows.append((".".join((*path, key)), _compact(one), _compact(other)))
            else:
                rows += differences(one, other, (*path, key))
        return rows
    return [] if plain(a) == plain(b) else [(".".join(path), _compact(a), _compact(b))]


def _name(block: Block) -> Any:
    return plain(block.children["name"]) if "name" in block.children else None


def _compact(node: Node | None) -> str:
    if node is None:
        return "-"
    if not isinstance(node, Block):
        return dump_value(node.value)
    value = plain(node)
    if "name" not in value:
        return dump_value(value)
    name = value.pop("name")
    return f"{name} {dump_value(value)}" if value else str(name)


def show_list() -> None:
    for name in recipe_names(ROOT, fragments=True):
        first = find_recipe(name, ROOT).read_text(encoding="utf-8").split("\n", 1)[0]
        print(f"{name:<28}{first.removeprefix('#').strip() if first.startswith('#') else ''}")


def main(argv: Sequence[str]) -> None:
    names = [word for word in argv[1:] if "=" not in word]
    settings = [word for word in argv[1:] if "=" in word]
    match (argv[0] if argv else "", len(names)):
        case ("list", 0):
            show_list()
        case ("show", 1):
            print(composed(names[0], settings).to_yaml(), end="")
        case ("check", _):
            check(names, settings)
        case ("diff", 2):
            a, b = (composed(name, settings) for name in names)
            for key, one, other in differences(a.tree, b.tree):
                print(f"{key}: {one} → {other}")
        case _:
            raise UserError(__doc__ or "", fix="see above")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
