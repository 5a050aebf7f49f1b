"""A tree against dataclasses: defaults filled in, unknown and missing keys, types, ranges. Nothing
is raised, all is collected."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from gipo_megatron.errors import UserError
from gipo_megatron.recipe import registry
from gipo_megatron.recipe.problems import Problem, suggest
from gipo_megatron.recipe.registry import OneOf, Range
from gipo_megatron.recipe.schema import RANGES
from gipo_megatron.recipe.source import DEFAULT, MISSING, Block, KeyPath, Leaf, Node, plain

NOT_BUILT = {
    ("parallel", "context"): "context parallelism",
    ("parallel", "expert"): "expert parallelism",
}


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def _blocks_of(hint: Any) -> type | None:
    """T for dict[str, T] where T is a dataclass."""
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
        return typing.cast(type, typing.get_args(hint)[1])
    return None


def _listed(hint: Any) -> type | None:
    """T for list[T] where T is a dataclass."""
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        return typing.cast(type, typing.get_args(hint)[0])
    return None


def _items(node: Node, path: KeyPath) -> list[tuple[KeyPath, Block | None]]:
    """(path, block) of each item of a list of blocks, `tasks[0]` and on; None for what is no block.
    A list has one origin."""
    values = node.value if isinstance(node, Leaf) and isinstance(node.value, list) else []
    blocks = [
        Block({k: Leaf(v, node.origin) for k, v in value.items()}, node.origin)
        if isinstance(value, dict)
        else None
        for value in values
    ]
    return [((*path[:-1], f"{path[-1]}[{i}]"), block) for i, block in enumerate(blocks)]


def _is_dict(hint: Any) -> bool:
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    return any(typing.get_origin(option) is dict or option is dict for option in options)


class Completion:
    """First pass: a tree with every key of `cls`, those not written at their default; unknown and
    missing keys are problems."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def complete(self, block: Block, cls: type, path: KeyPath = (), slot: str = "") -> Block:
        fields = registry.recipe_fields(cls)
        parts = registry.component_fields(cls)
        known = [f.name for f in (*fields, *parts)] + (["name"] if slot else [])
        for key, node in block.children.items():
            if key not in known:
                self._unknown(node, (*path, key), known, slot)
        children: dict[str, Node] = {"name": block.children["name"]} if slot else {}
        for f in dataclasses.fields(cls):
            child = block.children.get(f.name)
            if f in parts:
                children[f.name] = self.component(
                    child, f.metadata["slot"], f.metadata["default"], (*path, f.name), block.origin
                )
            elif f in fields:
                children[f.name] = self._field(
                    child, f, hints(cls)[f.name], (*path, f.name), block.origin
                )
        return Block(children, block.origin)

    def component(
        self, node: Node | None, slot: str, default: str, path: KeyPath, parent: str
    ) -> Node:
        key = ".".join(path)
        if node is None or (isinstance(node, Block) and "name" not in node.children and default):
            written = node.children if isinstance(node, Block) else {}
            node = Block(
                {"name": Leaf(default or MISSING, DEFAULT), **written},
                node.origin if node else DEFAULT,
            )
        if not isinstance(node, Block):
            self.problems.append(
                Problem(key, f"must be {{name: …}}, not {node.value!r}", node.origin)
            )
            return node
        name = node.children.get("name", Leaf(MISSING, node.origin))
        if not isinstance(name, Leaf) or name.value == MISSING:
            self.problems.append(
                Problem(
                    f"{key}.name",
                    "missing",
                    node.origin or parent,
                    f"one of {', '.join(registry.names(slot))}",
                )
            )
            return node
        cls = registry.lookup(slot, name.value) if isinstance(name.value, str) else None
        if cls is None:
            fix = suggest(str(name.value), registry.names(slot))
            self.problems.append(
                Problem(f"{key}.name", f"there is no {slot} {name.value!r}", name.origin, fix)
            )
            return node
        return self.complete(node, cls, path, slot)

    def _field(
        self, node: Node | None, f: dataclasses.Field[Any], hint: Any, path: KeyPath, parent: str
    ) -> Node:
        key = ".".join(path)
        each = _blocks_of(hint)
        if each is not None or dataclasses.is_dataclass(hint):
            block = Block({}, DEFAULT) if node is None else node
            if not isinstance(block, Block):
                self.problems.append(
                    Problem(key, f"must be a block of keys, not {block.value!r}", block.origin)
                )
                return block
            if each is None:
                return self.complete(block, hint, path)
            return Block(
                {
                    k: self._field(child, f, each, (*path, k), block.origin)
                    for k, child in block.children.items()
                },
                block.origin,
            )
        if isinstance(node, Block) and _is_dict(hint):
            return Leaf(plain(node), node.origin)
        # `???`: a recipe leaves it to its children, whatever the default
        asked = isinstance(node, Leaf) and node.value == MISSING
        if node is None or asked:
            default = MISSING if asked else _default(f)
            if default == MISSING:
                self.problems.append(
                    Problem(
                        key,
                        "missing",
                        parent if node is None else node.origin,
                        f"set it in the recipe, or {key}=…",
                        known=False,
                    )
                )
            return Leaf(default, DEFAULT if node is None else node.origin)
        item = _listed(hint)
        return node if item is None or not isinstance(node, Leaf) else self._list(node, item, path)

    def _list(self, node: Leaf, cls: type, path: KeyPath) -> Leaf:
        """A list of blocks, each completed; of another kind, Conversion says so."""
        items = _items(node, path)
        if not items:
            return node
        completed = [
            value if block is None else plain(self.complete(block, cls, at))
            for (at, block), value in zip(items, node.value, strict=True)
        ]
        return Leaf(completed, node.origin)

    def _unknown(self, node: Node, path: KeyPath, known: list[str], slot: str) -> None:
        key = ".".join(path)
        if path in NOT_BUILT:
            if plain(node) != 1:
                self.problems.append(
                    Problem(
                        key,
                        f"{NOT_BUILT[path]} is not built yet",
                        node.origin,
                        "remove it, or set it to 1",
                    )
                )
            return
        readers = [n for n in registry.names(slot) if path[-1] in _keys_of(slot, n)] if slot else []
        if readers:
            what = f"this {slot} does not read it"
            fix = f"read by: {', '.join(readers)}"
        else:
            what, fix = "unknown key", suggest(path[-1], known)
        self.problems.append(Problem(key, what, node.origin, fix))


def _keys_of(slot: str, name: str) -> list[str]:
    cls = registry.lookup(slot, name)
    assert cls is not None
    return [f.name for f in (*registry.recipe_fields(cls), *registry.component_fields(cls))]


class NotYet(Exception):
    """A component's __post_init__ got as far as its runtime objects, which exist only in a run."""


class _Later:
    """Stands for a runtime object while keys are checked; any use of it raises NotYet."""


def _not_yet(*_: Any) -> Any:
    raise NotYet


_VERBS = (
    *(
        "getattr",
        "call",
        "contains",
        "iter",
        "len",
        "getitem",
        "bool",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
    ),
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod"),
)
for _verb in _VERBS:
    setattr(_Later, f"__{_verb}__", _not_yet)


class Wrong(Exception):
    """A value that does not fit its type or range."""


class Conversion:
    """Second pass: a completed tree to typed values; wrong types and values out of range are
    problems."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def section(self, tree: Block, cls: type, name: str) -> Any:
        """One top-level section of `cls`, or None where something in it is wrong."""
        value = self._field(tree.children[name], cls, name, ())
        return None if value is Wrong else value

    def instance(self, node: Node, cls: type, path: KeyPath = ()) -> Any:
        """An instance of `cls`, or None where something below is wrong."""
        if not isinstance(node, Block):
            return None
        before = len(self.problems)
        values = {
            f.name: self._field(node.children[f.name], cls, f.name, path)
            for f in registry.recipe_fields(cls)
        }
        if len(self.problems) > before or any(v is Wrong for v in values.values()):
            return None
        return self._guarded(lambda: cls(**values), node, path)

    def component(self, node: Node, slot: str, path: KeyPath) -> dict[str, Any] | None:
        """What registry.build reads: {name, keys …, nested components …}."""
        if not isinstance(node, Block) or not isinstance(name := node.children.get("name"), Leaf):
            return None
        cls = registry.lookup(slot, name.value) if isinstance(name.value, str) else None
        if cls is None:
            return None
        before = len(self.problems)
        values = {
            f.name: self._field(node.children[f.name], cls, f.name, path)
            for f in registry.recipe_fields(cls)
        }
        if len(self.problems) == before and Wrong not in values.values():
            runtime = {f.name: _Later() for f in registry.runtime_fields(cls)}
            self._guarded(lambda: cls(**values, **runtime), node, path)
        for f in registry.component_fields(cls):
            values[f.name] = self.component(
                node.children[f.name], f.metadata["slot"], (*path, f.name)
            )
        return (
            None
            if len(self.problems) > before or Wrong in values.values()
            else {"name": name.value, **values}
        )

    def _guarded(self, make: Callable[[], Any], node: Block, path: KeyPath) -> Any:
        """A dataclass may refuse its values in __post_init__: ValueError, or UserError whose
        `where` ends in the key."""
        try:
            return make()
        except NotYet:
            pass
        except UserError as error:
            key = error.where.rsplit(".", 1)[-1]
            if key in node.children:
                self.problems.append(
                    Problem(
                        ".".join((*path, key)), error.what, node.children[key].origin, error.fix
                    )
                )
            else:
                self.problems.append(Problem(".".join(path), error.what, _written(node), error.fix))
        except ValueError as error:
            self.problems.append(Problem(".".join(path), str(error), _written(node)))
        return None

    def _field(self, node: Node, cls: type, name: str, path: KeyPath) -> Any:
        hint = hints(cls)[name]
        key = (*path, name)
        if each := _blocks_of(hint):
            if not isinstance(node, Block):
                return Wrong
            return {k: self.instance(child, each, (*key, k)) for k, child in node.children.items()}
        if dataclasses.is_dataclass(hint):
            block = self.instance(node, typing.cast(type, hint), key)
            return Wrong if block is None else block
        if isinstance(node, Block):
            self.problems.append(
                Problem(".".join(key), f"needs {spell(hint)}, not a block of keys", node.origin)
            )
            return Wrong
        if node.value == MISSING:
            return Wrong
        if (item := _listed(hint)) and isinstance(node.value, list):
            return self._list(node, item, key)
        try:
            value = convert(node.value, hint)
            refuse(value, [RANGES[cls][name]] if cls in RANGES and name in RANGES[cls] else [])
            return value
        except Wrong as wrong:
            self.problems.append(Problem(".".join(key), str(wrong), node.origin))
            return Wrong

    def _list(self, node: Leaf, cls: type, path: KeyPath) -> Any:
        values = []
        for at, block in _items(node, path):
            if block is None:
                self.problems.append(Problem(".".join(at), "needs a block of keys", node.origin))
            values.append(None if block is None else self.instance(block, cls, at))
        return Wrong if None in values else values


def _written(node: Block) -> str:
    """The file line of a block's last written key, since it is the likeliest culprit."""
    origins = [c.origin for c in node.children.values() if c.origin != DEFAULT]
    return origins[-1] if origins else node.origin


def refuse(value: Any, marks: list[Any]) -> None:
    for mark in marks:
        if isinstance(mark, Range | OneOf) and value is not None and (why := mark.refuse(value)):
            raise Wrong(why)


def convert(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it (an int is a float, a list may become a tuple; nothing else
    changes). Raises Wrong."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        converted = convert(value, arguments[0])
        refuse(converted, list(arguments[1:]))
        return converted
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, hint, arguments)
    if hint is Any:
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise Wrong(f"needs {spell(hint)}, not {_describe(value)}")
        return origin(convert(item, arguments[0]) for item in value)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise Wrong(f"needs {spell(hint)}, not {_describe(value)}")
        return (
            {convert(k, arguments[0]): convert(v, arguments[1]) for k, v in value.items()}
            if arguments
            else value
        )
    if hint is float and type(value) is int:
        return float(value)
    if hint in (bool, int, float, str):
        if type(value) is not hint:
            raise Wrong(f"needs {spell(hint)}, not {_describe(value)}")
        return value
    raise AssertionError(f"a recipe key cannot have the type {hint}")


def _convert_union(value: Any, hint: Any, options: tuple[Any, ...]) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    for option in options:
        try:
            return convert(value, option)
        except Wrong as wrong:
            if len(options) == 1 and "needs" not in str(wrong):
                raise
    raise Wrong(f"needs {spell(hint)}, not {_describe(value)}")


def spell(hint: Any) -> str:
    """A type as users say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return spell(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(option) for option in arguments)
    if origin in (list, tuple):
        return f"a list of {spell(arguments[0])}"
    if origin is dict or hint is dict:
        return "a block of keys"
    if dataclasses.is_dataclass(hint):
        return "blocks of keys"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    return names[hint] if hint in names else str(hint)


def _describe(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a block of keys",
    }
    return "null" if value is None else f"{value!r} ({kinds[type(value)]})"
