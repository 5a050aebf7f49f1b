"""A command line and the recipe files it names, merged into one tree. Problems are collected."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gipo_megatron.errors import UserError
from gipo_megatron.files import expand
from gipo_megatron.recipe.problems import Problem, RecipeErrors, suggest
from gipo_megatron.recipe.source import (
    COMMAND_LINE,
    Block,
    KeyPath,
    Leaf,
    Node,
    merge,
    parse_value,
    parse_yaml,
)

# folders of recipes/ that hold parts of recipes
FRAGMENTS = ("base", "model", "hardware", "data")


@dataclass
class Arguments:
    """`recipe=NAME with=a,b world=N key.path=value …`"""

    recipe: str = ""
    fragments: list[str] = field(default_factory=list)
    world: int = 0  # 0: not set
    overrides: Block = field(default_factory=lambda: Block({}, COMMAND_LINE))


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Raises RecipeErrors for words that are not key=value, for a recipe that is named twice or not
    at all, and for unreadable values."""
    found, recipes = Arguments(), []
    problems: list[Problem] = []
    for word in argv:
        key, equals, value = word.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path) or key.startswith("-"):
            fix = "write recipe=NAME, with=FRAGMENT,… or key.path=value"
            problems.append(Problem("", f"cannot read the argument {word!r}", COMMAND_LINE, fix))
        elif key == "recipe":
            recipes.append(value)
        elif key == "with":
            found.fragments += [name for name in value.split(",") if name]
        elif key == "world" and re.fullmatch(r"[1-9][0-9]{0,6}", value):
            found.world = int(value)
        elif key == "world":
            what = f"needs a number of processes, not {value!r}"
            problems.append(Problem("world", what, COMMAND_LINE))
        else:
            try:
                node = _nested(path, parse_value(value, path, COMMAND_LINE))
                found.overrides = merge(found.overrides, node)
            except UserError as error:
                problems.append(Problem(key, error.what, error.where, error.fix))
    if len(recipes) != 1 or not recipes[0]:
        many = f"one recipe at a time, not {', '.join(recipes)}"
        fix = "recipe=NAME; gipo recipe list shows the names"
        problems.append(Problem("recipe", many if recipes else "which recipe?", COMMAND_LINE, fix))
    if problems:
        raise RecipeErrors("command line", problems)
    found.recipe = recipes[0]
    return found


def _nested(path: KeyPath, node: Node) -> Block:
    for key in reversed(path):
        node = Block({key: node}, COMMAND_LINE)
    assert isinstance(node, Block)
    return node


def merged(argv: Sequence[str], root: Path, world: int | None = None) -> tuple[Block, str, int]:
    """Return what a command line describes, not yet checked: the tree, the recipe's name, the
    number of processes (0: not set).

    Raises RecipeErrors with every file and word that cannot be read.
    """
    arguments = parse_arguments(argv)
    files = Files(root)
    tree = Block({}, arguments.recipe)
    for name in (arguments.recipe, *arguments.fragments):
        path = files.find(name, COMMAND_LINE)
        tree = tree if path is None else merge(tree, files.load(path))
    if files.problems:
        raise RecipeErrors(arguments.recipe, files.problems)
    processes = arguments.world or world or int(os.environ.get("WORLD_SIZE", "0"))
    return merge(tree, arguments.overrides), arguments.recipe, processes


def recipe_names(root: Path, fragments: bool = False) -> list[str]:
    """Return the names of all recipes below `root`; with `fragments`, of their parts too."""
    names = sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))
    return [n for n in names if fragments or n.split("/")[0] not in FRAGMENTS]


def find_recipe(
    name: str, root: Path, where: str = COMMAND_LINE, beside: Path | None = None
) -> Path:
    """Return the file of a recipe or a fragment: below `root`, else a path (./ and ../ count from
    `beside`, the folder of the file that names it). Raises UserError."""
    place = expand(name, where)
    local = (beside or Path()) / name if name.startswith(".") else Path(place)
    for candidate in (root / f"{name}.yaml", local, Path(f"{local}.yaml")):
        if candidate.suffix == ".yaml" and candidate.is_file():
            return candidate
    fix = suggest(name, recipe_names(root, fragments=True))
    raise UserError(f"there is no recipe {name!r}", where=where, fix=fix)


def display(path: Path, root: Path) -> str:
    """Return a recipe file's name in messages and origins: relative to the repository where the
    file lies inside."""
    resolved, home = path.resolve(), root.resolve().parent
    inside = resolved.is_relative_to(home)
    return resolved.relative_to(home).as_posix() if inside else path.as_posix()


class Files:
    """Reads recipe files depth first and collects problems; an unreadable file counts as empty."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []

    def load(self, path: Path, chain: tuple[Path, ...] = ()) -> Block:
        """Return the file at `path` merged over its defaults."""
        own = self.own(path)
        keys = {key: node for key, node in own.children.items() if key != "defaults"}
        return merge(self.inherited(path, own, chain), Block(keys, own.origin))

    def own(self, path: Path) -> Block:
        """Return the file alone."""
        name = display(path, self.root)
        try:
            return parse_yaml(path.read_text(encoding="utf-8"), name)
        except UserError as error:
            self.problems.append(Problem("", error.what, error.where, error.fix))
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(Problem("", f"cannot be read: {error}", name))
        return Block({}, name)

    def inherited(self, path: Path, own: Block, chain: tuple[Path, ...] = ()) -> Block:
        """Return the file's defaults, merged; `chain`: the files that led to it."""
        result = Block({}, own.origin)
        node = own.children.get("defaults", Leaf([], own.origin))
        names = node.value if isinstance(node, Leaf) else None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            fix = "defaults: [base/sft, model/tiny]"
            what = "needs a list of recipe names"
            self.problems.append(Problem("defaults", what, node.origin, fix))
            return result
        above = (*chain, path.resolve())
        for name in names:
            found = self.find(name, node.origin, path.parent)
            if found is None:
                continue
            if found.resolve() in above:
                cycle = (*above[above.index(found.resolve()) :], found)
                what = f"a cycle: {' → '.join(display(p, self.root) for p in cycle)}"
                fix = "remove one of these"
                self.problems.append(Problem("defaults", what, node.origin, fix))
            else:
                result = merge(result, self.load(found, above))
        return result

    def find(self, name: str, where: str, beside: Path | None = None) -> Path | None:
        """Return a recipe's file, or None with a problem."""
        try:
            return find_recipe(name, self.root, where, beside)
        except UserError as error:
            self.problems.append(Problem("", error.what, error.where, error.fix))
            return None
