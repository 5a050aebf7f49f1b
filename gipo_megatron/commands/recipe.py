"""Look at recipes without starting anything.

gipo recipe list                          names, and the first line of each
gipo recipe show NAME [key=value …]       all keys, with the file and line of each value
gipo recipe check [NAME…] [key=value …]   all problems at once; without a name: every recipe
gipo recipe diff A B [key=value …]        the keys that differ

with=FRAGMENT,… adds fragments, world=N checks for N processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gipo_megatron.commands import RECIPES
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.source import Block, Node, dump_value, plain
from gipo_megatron.screen import shown

if TYPE_CHECKING:  # imported where a recipe is composed: `list` needs no torch
    from gipo_megatron.evaluation.recipe import EvaluationRecipe
    from gipo_megatron.recipe.schema import Recipe


def composed(name: str, settings: Sequence[str]) -> Recipe | EvaluationRecipe:
    """Return the checked recipe, of a training or of an evaluation."""
    from gipo_megatron.evaluation.recipe import compose_evaluation, is_evaluation
    from gipo_megatron.recipe.compose import compose

    argv = [f"recipe={name}", *settings]
    return (compose_evaluation if is_evaluation(argv, RECIPES) else compose)(argv, RECIPES)


def summary(recipe: Recipe | EvaluationRecipe) -> str:
    """Return one line: `ok hh_gipo: ppo; 8 processes = tensor 4 × pipeline 1 × data 2; …`"""
    from gipo_megatron.evaluation.recipe import EvaluationRecipe
    from gipo_megatron.recipe.length import stated_length

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
    rows = batch.minibatch // recipe.data_parallel
    slots = f"{rows // batch.micro_batch}" if batch.micro_batch else f"{rows} rows in"
    step = (
        f"minibatch {batch.minibatch} = data {recipe.data_parallel} × {slots} micro-batches of"
        f" {batch.micro}"
    )
    if "evaluation" in recipe.tree.children:  # responses are drawn
        rows = batch.prompts * batch.responses
        step = (
            f"{batch.prompts} prompts × {batch.responses} responses = {rows // batch.minibatch}"
            f" minibatches; {step}"
        )
    length, _ = stated_length(recipe)
    return f"ok {recipe.name}: {recipe.algorithm['name']}; {world}; {step}; {length}"


def check(names: Sequence[str], settings: Sequence[str]) -> None:
    """Print a line per correct recipe. Raises UserError with all problems of the others.

    Without names, a recipe whose architecture would be read from weights that are not on this
    machine is passed over.
    """
    from gipo_megatron.recipe.files import recipe_names
    from gipo_megatron.recipe.problems import RecipeErrors

    failed: list[UserError] = []
    for name in names or recipe_names(RECIPES):
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
            print(shown("  warning: " + "; ".join(map(str.strip, warning.splitlines()))))
    if failed:
        raise UserError("\n".join(str(error) for error in failed))


def differences(a: Node, b: Node, path: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    """Return (key, value in a, value in b) of every key that differs; a component of another name
    is one row."""
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
    names = {
        path.relative_to(RECIPES).with_suffix("").as_posix(): path
        for path in RECIPES.rglob("*.yaml")
    }
    for name, path in sorted(names.items()):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        print(f"{name:<28}{first.removeprefix('#').strip() if first.startswith('#') else ''}")


def main(argv: Sequence[str]) -> int:
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
    return 0
