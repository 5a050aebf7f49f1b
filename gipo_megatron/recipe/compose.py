"""From a command line to a checked recipe: files, fragments, overrides, interpolation. All problems
come back together."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from gipo_megatron import algorithms, components
from gipo_megatron.errors import UserError
from gipo_megatron.recipe import check, registry
from gipo_megatron.recipe.architecture import KEY as ARCHITECTURE
from gipo_megatron.recipe.architecture import read_architecture
from gipo_megatron.recipe.needs import needed, pruned, unneeded
from gipo_megatron.recipe.problems import Problem, RecipeErrors, suggest
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.recipe.source import (
    COMMAND_LINE,
    MISSING,
    Block,
    KeyPath,
    Leaf,
    Node,
    leaves,
    merge,
    parse_value,
    parse_yaml,
    plain,
)
from gipo_megatron.recipe.validate import Completion, Conversion

# folders of recipes/ that are parts of recipes, not recipes
FRAGMENTS = ("base", "model", "hardware", "data")


@dataclass(frozen=True)
class Arguments:
    """`recipe=NAME with=a,b world=N key.path=value …`"""

    recipe: str
    fragments: tuple[str, ...] = ()
    world: int | None = None
    overrides: Block = field(default_factory=lambda: Block({}, COMMAND_LINE))


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Raises RecipeErrors for words that are not key=value, a recipe given twice or not at all, and
    unreadable values."""
    problems: list[Problem] = []
    recipe: list[str] = []
    fragments: list[str] = []
    world: int | None = None
    overrides = Block({}, COMMAND_LINE)
    for word in argv:
        key, equals, value = word.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path) or key.startswith("-"):
            problems.append(
                Problem(
                    "",
                    f"cannot read the argument {word!r}",
                    COMMAND_LINE,
                    "write recipe=NAME, with=FRAGMENT,… or key.path=value",
                )
            )
        elif key == "recipe":
            recipe.append(value)
        elif key == "with":
            fragments += [name for name in value.split(",") if name]
        elif key == "world":
            if not value.isdigit() or int(value) == 0:
                problems.append(
                    Problem("world", f"needs a number of processes, not {value!r}", COMMAND_LINE)
                )
            else:
                world = int(value)
        else:
            try:
                overrides = merge(overrides, _nested(path, parse_value(value, path, COMMAND_LINE)))
            except UserError as error:
                problems.append(Problem(key, error.what, error.where, error.fix))
    if len(recipe) != 1 or not recipe[0]:
        what = "which recipe?" if not recipe else f"one recipe at a time, not {', '.join(recipe)}"
        problems.append(
            Problem(
                "recipe", what, COMMAND_LINE, "recipe=NAME; tools/recipe.py list shows the names"
            )
        )
    if problems:
        raise RecipeErrors("command line", problems)
    return Arguments(recipe[0], tuple(fragments), world, overrides)


def _nested(path: KeyPath, node: Node) -> Block:
    for key in reversed(path):
        node = Block({key: node}, COMMAND_LINE)
    assert isinstance(node, Block)
    return node


# -------------------------------------------------------------------------------------------- files


def recipe_names(root: Path, fragments: bool = False) -> list[str]:
    """Names of all recipes below `root`; with `fragments`, of their parts too."""
    names = sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))
    return [n for n in names if fragments or n.split("/")[0] not in FRAGMENTS]


def find_recipe(
    name: str, root: Path, where: str = COMMAND_LINE, beside: Path | None = None
) -> Path:
    """The file of a recipe or a fragment: below `root`, else a path (./ and ../ count from the file
    that names it). Raises UserError."""
    local = (beside or Path()) / name if name.startswith(".") else Path(name)
    for candidate in (root / f"{name}.yaml", local, local.with_name(local.name + ".yaml")):
        if candidate.suffix == ".yaml" and candidate.is_file():
            return candidate
    raise UserError(
        f"there is no recipe {name!r}",
        where=where,
        fix=suggest(name, recipe_names(root, fragments=True)),
    )


def display(path: Path, root: Path) -> str:
    """How messages and origins name a recipe file: from the repository's folder, where it lies
    inside."""
    resolved, home = path.resolve(), root.resolve().parent
    return (
        resolved.relative_to(home).as_posix() if resolved.is_relative_to(home) else path.as_posix()
    )


class Files:
    """Reads recipe files depth first; problems are collected, and a file that cannot be read counts
    as empty."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []

    def load(self, path: Path, chain: tuple[Path, ...] = ()) -> Block:
        """The file at `path`, its defaults below it."""
        return self._over_defaults(path, self.own(path), chain)

    def own(self, path: Path) -> Block:
        """The file alone."""
        try:
            return parse_yaml(path.read_text(encoding="utf-8"), display(path, self.root))
        except UserError as error:
            self.problems.append(Problem("", error.what, error.where, error.fix))
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(Problem("", f"cannot be read: {error}", display(path, self.root)))
        return Block({}, display(path, self.root))

    def inherited(self, path: Path, own: Block, chain: tuple[Path, ...] = ()) -> Block:
        """What the file's defaults give, before it says anything itself."""
        merged = Block({}, own.origin)
        node = own.children.get("defaults", Leaf([], own.origin))
        names = node.value if isinstance(node, Leaf) else None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            self.problems.append(
                Problem(
                    "defaults",
                    "needs a list of recipe names",
                    node.origin,
                    "defaults: [base/gipo, model/tiny]",
                )
            )
            return merged
        for name in names:
            found = self.find(name, node.origin, path.parent)
            if found is None:
                continue
            above = (*chain, path.resolve())
            if found.resolve() in above:
                cycle = " → ".join(
                    display(p, self.root) for p in (*above[above.index(found.resolve()) :], found)
                )
                self.problems.append(
                    Problem("defaults", f"a cycle: {cycle}", node.origin, "remove one of these")
                )
                continue
            merged = merge(merged, self.load(found, above))
        return merged

    def find(self, name: str, where: str, beside: Path | None = None) -> Path | None:
        try:
            return find_recipe(name, self.root, where, beside)
        except UserError as error:
            self.problems.append(Problem("", error.what, error.where, error.fix))
            return None

    def _over_defaults(self, path: Path, own: Block, chain: tuple[Path, ...]) -> Block:
        inherited = self.inherited(path, own, chain)
        return merge(
            inherited, Block({k: v for k, v in own.children.items() if k != "defaults"}, own.origin)
        )


# -------------------------------------------------------------------------------------- composition


def compose(argv: Sequence[str], root: Path, world: int | None = None) -> Recipe:
    """The recipe a command line describes, checked.

    The number of processes is `world=` on the command line, else `world`, else WORLD_SIZE, else the
    recipe's hardware.gpus, else as few as its parallel sizes allow. Raises RecipeErrors with every
    problem found.
    """
    return checked(*merged(argv, root, world))


def merged(argv: Sequence[str], root: Path, world: int | None = None) -> tuple[Block, str, int]:
    """What a command line describes, not yet checked: the tree, the recipe's name, the number of
    processes (0: not said).

    Raises RecipeErrors with every file and word that cannot be read.
    """
    arguments = parse_arguments(argv)
    files = Files(root)
    tree = Block({}, arguments.recipe)
    for name in (arguments.recipe, *arguments.fragments):
        path = files.find(name, COMMAND_LINE)
        tree = tree if path is None else merge(tree, files.load(path))
    tree = merge(tree, arguments.overrides)
    if files.problems:
        raise RecipeErrors(arguments.recipe, files.problems)
    return (
        tree,
        arguments.recipe,
        arguments.world or world or int(os.environ.get("WORLD_SIZE", "0")),
    )


def checked(tree: Block, name: str, world: int = 0) -> Recipe:
    """The typed recipe of a merged tree. Raises RecipeErrors with every problem found."""
    problems = load_components(tree)
    completion, conversion = Completion(), Conversion()
    # which weights are loaded; its problems come again below
    draft = resolve(Completion().complete(tree, Recipe), [])
    needs = needed(draft)
    reading = read_architecture(tree, draft, {f"models.{role}.load": role for role in needs.roles})
    problems += reading.problems
    tree = resolve(completion.complete(reading.tree, Recipe), completion.problems)
    # A model that nothing asks for may stay as its base recipe left it, without weights to load.
    found = [p for p in completion.problems if p.known or not unneeded(p.key, needs)]
    implied = [
        p for p in found if reading.settled and not p.known and p.key.startswith(f"{ARCHITECTURE}.")
    ]
    problems += [p for p in found if p not in implied]
    sections = {
        f.name: conversion.section(tree, Recipe, f.name) for f in registry.recipe_fields(Recipe)
    }
    sections["algorithm"] = conversion.component(
        tree.children["algorithm"], "algorithm", ("algorithm",)
    )
    problems += conversion.problems
    if sections["models"] is not None:
        left = {
            role: config
            for role, config in sections["models"].items()
            if config is not None or not unneeded(f"models.{role}.", needs)
        }
        sections["models"] = left
    world = world or check.default_world(sections["hardware"], sections["parallel"])
    report = check.cross_check(sections, tree, needs, world)
    problems += report.problems
    if problems or implied:
        raise RecipeErrors(name, problems or implied)
    sections["models"] = {role: sections["models"][role] for role in needs.roles}
    warnings = tuple(map(str, report.warnings))
    return Recipe(
        **sections,
        name=name,
        world=world,
        trained=needs.trained,
        warnings=warnings,
        tree=pruned(tree, needs),
    )


def load_components(tree: Block) -> list[Problem]:
    """Registers what the package brings, then the recipe's plugins: modules on the path or in the
    current folder."""
    for package in (components, algorithms):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # plugins and reward functions
    node = tree.children.get("plugins")
    if not isinstance(node, Leaf) or not isinstance(node.value, list):
        return []  # absent, or of a wrong type, which the schema will say
    problems = []
    for name in node.value:
        try:
            importlib.import_module(str(name))
        # a plugin is somebody else's code: whatever it raises is a problem of this recipe
        except Exception as error:
            fix = (
                "plugins are modules on PYTHONPATH or in the current folder"
                if isinstance(error, ModuleNotFoundError)
                else ""
            )
            problems.append(
                Problem(
                    "plugins",
                    f"cannot import {name!r}: {type(error).__name__}: {error}",
                    node.origin,
                    fix,
                )
            )
    return problems


def resolve(tree: Block, problems: list[Problem]) -> Block:
    """`${other.key}` and `${oc.env:NAME}` replaced by their values (OmegaConf's interpolation)."""
    bare: dict[str, Any] = plain(tree)
    asking = [(path, leaf) for path, leaf in leaves(tree) if _has_interpolation(leaf.value)]
    values: dict[KeyPath, Any] = {}

    def refuse(path: KeyPath, leaf: Leaf, error: OmegaConfBaseException) -> None:
        values[path] = MISSING
        # what it points at has been reported itself
        if not isinstance(error, InterpolationToMissingValueError):
            what = f"cannot resolve {leaf.value!r}: {str(error).splitlines()[0]}"
            problems.append(Problem(".".join(path), what, leaf.origin, known=False))

    for path, leaf in asking:
        try:
            OmegaConf.create({"value": leaf.value})
        except OmegaConfBaseException as error:  # not even an expression
            refuse(path, leaf, error)
            _set(bare, path, None)
    config = OmegaConf.create(bare)
    for path, leaf in asking:
        if path not in values:
            try:
                value = functools.reduce(lambda node, key: node[key], path, config)
                values[path] = (
                    OmegaConf.to_container(value, resolve=True)
                    if OmegaConf.is_config(value)
                    else value
                )
            except OmegaConfBaseException as error:
                refuse(path, leaf, error)
    return _replaced(tree, values)


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, list):
        return any(_has_interpolation(item) for item in value)
    if isinstance(value, dict):
        return any(_has_interpolation(item) for item in value.values())
    return isinstance(value, str) and "${" in value


def _set(tree: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def _replaced(node: Block, values: dict[KeyPath, Any], path: KeyPath = ()) -> Block:
    children: dict[str, Node] = {}
    for key, child in node.children.items():
        below = (*path, key)
        if isinstance(child, Block):
            children[key] = _replaced(child, values, below)
        else:
            children[key] = Leaf(values[below], child.origin) if below in values else child
    return Block(children, node.origin)
