"""A tree against dataclasses in one pass: defaults filled in, values typed, problems collected."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from gipo_megatron import registry
from gipo_megatron.errors import UserError
from gipo_megatron.recipe.problems import Problem, suggest
from gipo_megatron.recipe.source import (
    COMMAND_LINE,
    DEFAULT,
    MISSING,
    Block,
    KeyPath,
    Leaf,
    Node,
    Unknown,
    leaves,
    plain,
    quoted,
)
from gipo_megatron.typed import KINDS, Mismatch, convert, options, spell

NOT_BUILT = {
    "parallel.context": "context parallelism",
    "parallel.expert": "expert parallelism",
}


class Wrong:
    """The type of WRONG, the value of a key or block with a problem."""


WRONG = Wrong()


class Validation:
    """Completes and types a tree, and collects its problems. Each method returns the completed node
    and its value, or WRONG; the problem of a WRONG value is in `problems` or in `hidden`."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        # of ${…} that point at a key with a problem: reported where there is no other problem
        self.hidden: list[Problem] = []

    def block(
        self, block: Block, cls: type, path: KeyPath = (), slot: str = ""
    ) -> tuple[Block, dict[str, Any]]:
        """A block of the keys of `cls`: the completed block, {field: value}."""
        parts = {f.name: f for f in registry.component_fields(cls)}
        fields = {f.name: f for f in registry.recipe_fields(cls)}
        known = [*fields, *parts, *(["name"] if slot else [])]
        for key, node in block.children.items():
            if key not in known:
                self._unknown(node, (*path, key), known, slot)
        children: dict[str, Node] = {"name": block.children["name"]} if slot else {}
        values: dict[str, Any] = {}
        for name in (f.name for f in dataclasses.fields(cls) if f.name in known):
            child, at = block.children.get(name), (*path, name)
            if name in parts:
                about = parts[name].metadata
                found = self.component(child, about["slot"], about["default"], at, block.origin)
            else:
                found = self._field(child, cls, fields[name], at, block.origin)
            children[name], values[name] = found
        return Block(children, block.origin), values

    def component(
        self, node: Node | None, slot: str, default: str, path: KeyPath, parent: str
    ) -> tuple[Node, Any]:
        """A component's block: the completed block, the dict that registry.build reads."""
        key = ".".join(path)
        if isinstance(node, Leaf):
            return node, self._wrong_leaf(key, f"must be {{name: …}}, not {node.value!r}", node)
        where, block = parent if node is None else node.origin, with_name(node, default)
        name = block.children.get("name", Leaf(MISSING, where))
        if isinstance(name, Block) or name.value == MISSING:
            for near in difflib.get_close_matches("name", {*block.children} - {"name"}):
                self._unknown(block.children[near], (*path, near), ["name"], "")
            fix = f"one of {', '.join(registry.names(slot))}"
            return block, self._wrong(f"{key}.name", "missing", where, fix)
        cls = registry.lookup(slot, name.value)
        if cls is None:
            fix = suggest(str(name.value), registry.names(slot))
            what = f"there is no {slot} {name.value!r}"
            return block, self._wrong_leaf(f"{key}.name", what, name, fix)
        completed, values = self.block(block, cls, path, slot)
        before = len(self.problems)
        if not any(is_wrong(value) for value in values.values()):
            for error in _key_problems(cls, values):
                self._refused(error, completed, path)
            if len(self.problems) == before:
                return completed, {"name": name.value, **values}
        return completed, WRONG

    def _field(
        self, node: Node | None, cls: type, f: dataclasses.Field[Any], path: KeyPath, parent: str
    ) -> tuple[Node, Any]:
        """The value of a key: a nested block, a dict or list of blocks, or a plain value."""
        hint, key = registry.hints(cls)[f.name], ".".join(path)
        each = _dataclass_in(hint, dict)
        if each is not None or dataclasses.is_dataclass(hint):
            return self._blocks(node or Block({}, DEFAULT), each, hint, path)
        if isinstance(node, Block):
            if not _is_dict(hint):
                what = f"needs {spell(hint)}, not a block of keys"
                return node, self._wrong(key, what, node.origin, _how_to_quote(key, node, hint))
            unknown = [leaf for _, leaf in leaves(node) if isinstance(leaf.value, Unknown)]
            node = unknown[0] if unknown else Leaf(plain(node), node.origin)
        if node is None:
            node = Leaf(_default(f), DEFAULT)
            if node.value == MISSING:
                return node, self._absent(key, parent)
        if node.value == MISSING:
            return node, self._absent(key, node.origin)
        item = _dataclass_in(hint, list)
        if item is not None and isinstance(node.value, list):
            return self._list(node, item, path)
        try:
            return node, convert(node.value, hint)
        except Mismatch as mismatch:
            fix = _how_to_quote(key, node, hint)
            return node, self._wrong_leaf(key, str(mismatch), node, fix)

    def _blocks(self, node: Node, each: type | None, cls: Any, path: KeyPath) -> tuple[Node, Any]:
        """An instance of `cls`; with `each`, a dict of instances, some of which may be WRONG."""
        if isinstance(node, Leaf):
            what = f"must be a block of keys, not {node.value!r}"
            return node, self._wrong_leaf(".".join(path), what, node)
        if each is None:
            return self._instance(node, cls, path)
        found = {
            key: self._blocks(child, None, each, (*path, key))
            for key, child in node.children.items()
        }
        completed = Block({key: child for key, (child, _) in found.items()}, node.origin)
        return completed, {key: value for key, (_, value) in found.items()}

    def _instance(self, block: Block, cls: type, path: KeyPath) -> tuple[Block, Any]:
        completed, values = self.block(block, cls, path)
        if any(is_wrong(value) for value in values.values()):
            return completed, WRONG
        try:
            return completed, cls(**values)
        except ValueError as error:
            return completed, self._refused(error, completed, path)

    def _list(self, node: Leaf, cls: type, path: KeyPath) -> tuple[Leaf, Any]:
        """A list of blocks, `tasks[0]` and on. All of a list has one origin."""
        completed, values = [], []
        for i, item in enumerate(node.value):
            at = (*path[:-1], f"{path[-1]}[{i}]")
            if isinstance(item, dict):
                block = Block({k: Leaf(v, node.origin) for k, v in item.items()}, node.origin)
                found, value = self._instance(block, cls, at)
                completed.append(plain(found))
            else:
                value = self._wrong(".".join(at), "needs a block of keys", node.origin)
                completed.append(item)
            values.append(value)
        return Leaf(completed, node.origin), WRONG if WRONG in values else values

    def _refused(self, error: ValueError, node: Block, path: KeyPath) -> Wrong:
        """A block that its class refuses; a UserError whose `where` ends in a key names it."""
        if not isinstance(error, UserError):
            error = UserError(str(error))
        key = error.where.rsplit(".", 1)[-1]
        if key in node.children:
            where = node.children[key].origin
            return self._wrong(".".join((*path, key)), error.what, where, error.fix)
        return self._wrong(".".join(path), error.what, _last_written(node), error.fix)

    def _unknown(self, node: Node, path: KeyPath, known: list[str], slot: str) -> None:
        key = ".".join(path)
        readers = [n for n in registry.names(slot) if path[-1] in _keys_of(slot, n)] if slot else []
        if key in NOT_BUILT:
            if plain(node) != 1:
                what = f"{NOT_BUILT[key]} is not built yet"
                self._wrong(key, what, node.origin, "remove it, or set it to 1")
        elif readers:
            what = f"this {slot} does not read it"
            self._wrong(key, what, node.origin, f"read by: {', '.join(readers)}")
        else:
            self._wrong(key, "unknown key", node.origin, suggest(path[-1], known))

    def _absent(self, key: str, where: str) -> Wrong:
        fix = f"set it in the recipe, or {key}=…"
        self.problems.append(Problem(key, "missing", where, fix, absent=True))
        return WRONG

    def _wrong(self, key: str, what: str, where: str, fix: str = "") -> Wrong:
        self.problems.append(Problem(key, what, where, fix))
        return WRONG

    def _wrong_leaf(self, key: str, what: str, leaf: Leaf, fix: str = "") -> Wrong:
        if isinstance(leaf.value, Unknown):
            self.hidden.append(Problem(key, leaf.value.why, leaf.origin, absent=True))
            return WRONG
        return self._wrong(key, what, leaf.origin, fix)


def is_wrong(value: Any) -> bool:
    """Return whether a value, or one in a dict of blocks, has a problem."""
    return value is WRONG or (isinstance(value, dict) and WRONG in value.values())


def with_name(node: Node | None, default: str) -> Block:
    """A component's block with its default name where none is written."""
    block = node if isinstance(node, Block) else Block({}, DEFAULT)
    if "name" in block.children or not default:
        return block
    return Block({"name": Leaf(default, DEFAULT), **block.children}, block.origin)


def _key_problems(cls: type, values: dict[str, Any]) -> Iterator[UserError]:
    """Problems of a component's keys; no runtime object exists yet."""
    if hasattr(cls, "problems"):
        keys_only: Any = object.__new__(cls)
        for name, value in values.items():
            object.__setattr__(keys_only, name, value)
        yield from keys_only.problems()


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default as YAML has it: a tuple is a list there."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if isinstance(field.default, tuple):
        return [*field.default]
    return MISSING if field.default is dataclasses.MISSING else field.default


def _keys_of(slot: str, name: str) -> Iterator[str]:
    cls = registry.lookup(slot, name)
    assert cls is not None
    yield from (f.name for f in (*registry.recipe_fields(cls), *registry.component_fields(cls)))


def _last_written(node: Block) -> str:
    """The origin of a block's last written key: the likeliest culprit."""
    origins = [c.origin for c in node.children.values() if c.origin != DEFAULT]
    return origins[-1] if origins else node.origin


def _dataclass_in(hint: Any, container: type) -> type | None:
    """T for dict[str, T] or list[T] where T is a dataclass."""
    arguments = typing.get_args(hint)
    found = typing.get_origin(hint) is container and dataclasses.is_dataclass(arguments[-1])
    return typing.cast(type, arguments[-1]) if found else None


def _is_dict(hint: Any) -> bool:
    return any(typing.get_origin(o) is dict or o is dict for o in options(hint))


def _how_to_quote(key: str, node: Node, hint: Any) -> str:
    """Advice for a text on the command line that YAML reads as a number, a list or a block."""
    text = isinstance(node, Leaf) and isinstance(node.value, str)
    wanted = node.origin == COMMAND_LINE and spell(hint) == KINDS[str]
    return quoted(key, "…") if wanted and not text else ""
