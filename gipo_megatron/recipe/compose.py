"""From a command line to a checked recipe. All problems are reported together."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from gipo_megatron import algorithms, components
from gipo_megatron.recipe.architecture import read_architecture
from gipo_megatron.recipe.check import PROBLEMS, WARNINGS
from gipo_megatron.recipe.draft import Draft
from gipo_megatron.recipe.files import merged
from gipo_megatron.recipe.interpolation import resolve
from gipo_megatron.recipe.needs import needed, pruned
from gipo_megatron.recipe.problems import Problem, RecipeErrors
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.recipe.source import Block, Leaf, leaves
from gipo_megatron.recipe.validate import WRONG, Validation
from gipo_megatron.registry import user_module
from gipo_megatron.screen import found_in


def compose(argv: Sequence[str], root: Path, world: int | None = None) -> Recipe:
    """Return the recipe that a command line describes, checked.

    The number of processes is `world=` on the command line, else `world`, else WORLD_SIZE, else the
    recipe's hardware.gpus, else as few as its parallel sizes allow. Raises RecipeErrors with every
    problem found.
    """
    return checked(*merged(argv, root, world))


def checked(tree: Block, name: str, world: int = 0) -> Recipe:
    """Return the typed recipe of a merged tree. Raises RecipeErrors with every problem found."""
    draft, problems, hidden = drafted(tree, Recipe, world, _loads)
    needs, models = draft.needs, draft.sections["models"]
    # A model that nothing needs may stay as its base recipe leaves it, without weights to load.
    problems, hidden = (
        [p for p in found if not (p.absent and needs.idle(p.key))] for found in (problems, hidden)
    )
    if models is not WRONG:
        draft.sections["models"] = {
            role: model
            for role, model in models.items()
            if not (model is WRONG and needs.idle(f"models.{role}"))
        }
    problems += draft.found(PROBLEMS)
    if problems or hidden:
        raise RecipeErrors(name, problems or hidden)
    return Recipe(
        **{**draft.sections, "models": {role: draft.models[role] for role in needs.roles}},
        name=name,
        world=draft.world,
        trained=needs.trained,
        warnings=tuple(map(str, draft.found(WARNINGS))),
        tree=pruned(draft.tree, needs),
    )


def _loads(tree: Block) -> dict[str, str]:
    return {f"models.{role}.load": role for role in needed(tree).roles}


def drafted(
    tree: Block, cls: type, world: int, loads: Callable[[Block], Mapping[str, str]]
) -> tuple[Draft, list[Problem], list[Problem]]:
    """Validate a merged tree against `cls`: the draft, its problems, and those to report only where
    there are no others.

    loads: from the tree to {key that names weights: the role they are loaded as}.
    """
    problems = load_components(tree)
    tree = resolve(tree, problems)
    tree = read_architecture(tree, loads(tree), problems)
    problems += secrets(tree)
    validation = Validation()
    completed, sections = validation.block(tree, cls)
    draft = Draft(completed, sections, needed(completed), world)
    return draft, problems + validation.problems, validation.hidden


def secrets(tree: Block) -> Iterator[Problem]:
    """Yield a problem for each value that holds a key: run.dir, reports and W&B show recipes."""
    for path, leaf in leaves(tree):
        if what := found_in(str(leaf.value)):
            fix = "leave it out: programs that need a key read it from the environment"
            yield Problem(".".join(path), f"contains {what}", leaf.origin, fix)


def load_components(
    tree: Block, packages: Sequence[ModuleType] = (components, algorithms)
) -> list[Problem]:
    """Import the modules of `packages`, then the recipe's plugins: modules on the path or in the
    current folder. Returns the problems of the plugins."""
    for package in packages:
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    node = tree.children.get("plugins")
    if not isinstance(node, Leaf) or not isinstance(node.value, list):
        return []  # not set, or of a wrong type, which validation reports
    problems = []
    for name in node.value:
        try:
            user_module(str(name))
        except Exception as error:  # a plugin is other people's code and may raise anything
            path = "plugins are modules on PYTHONPATH or in the current folder"
            fix = path if isinstance(error, ModuleNotFoundError) else ""
            what = f"cannot import {name!r}: {type(error).__name__}: {error}"
            problems.append(Problem("plugins", what, node.origin, fix))
    return problems
