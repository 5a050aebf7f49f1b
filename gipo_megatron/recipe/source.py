"""YAML text to a tree whose every node remembers where it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.registry import SLOTS

DEFAULT = "default"  # origin of a value that nobody wrote
COMMAND_LINE = "command line"  # origin of what is written there
MISSING = "???"  # a value that a child must give
COMPONENTS = ("algorithm", "judge")  # sections that are components themselves


@dataclass(frozen=True)
class Leaf:
    value: Any  # a scalar, a list, or a dict that is one value
    origin: str


@dataclass(frozen=True)
class Block:
    children: Mapping[str, Node]
    origin: str


Node = Leaf | Block
KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-3` is a number; yes, no, on, off and dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    ignore_aliases = lambda self, data: True  # noqa: E731  (no anchors)


_SCALARS = (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
    ("null", r"^(?:~|null|Null|)$", ["~", "n", "N", ""]),
)
for _cls in (_Loader, _Dumper):
    for _tag, _pattern, _first in _SCALARS:
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def dump_value(value: Any) -> str:
    """One line of YAML that parses back to `value`."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        allow_unicode=True,
        width=10**9,
        sort_keys=False,
    )
    return text.removesuffix("\n").removesuffix("\n...")


def parse_yaml(text: str, file: str) -> Block:
    """The tree of one file.

    Raises UserError (file and line named) for text that is no YAML, no mapping, or has a key twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Block({}, file)
        if not isinstance(node, yaml.MappingNode):
            raise UserError("a recipe is a mapping of keys to values", where=file)
        tree = _tree(loader, node, file, ())
        assert isinstance(tree, Block)
        return tree
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        raise UserError(
            "not valid YAML:"
            f" {error.problem if isinstance(error, yaml.MarkedYAMLError) else error}",
            where=f"{file}:{mark.line + 1}" if mark else file,
            fix='inside {…} quote "${…}", "???" and text with colons',
        ) from None


def parse_value(text: str, path: KeyPath, origin: str) -> Node:
    """The value of `key=text` on the command line; nothing after `=` is the empty string. Raises
    UserError."""
    if text == "":
        return Leaf("", origin)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (
            Leaf(text, origin)
            if node is None
            else _tree(loader, node, origin, path, line_numbers=False)
        )
    except yaml.YAMLError:
        raise UserError(
            f"cannot read the value {text!r}", where=origin, fix="quote it: key='…'"
        ) from None


def _tree(
    loader: _Loader, node: yaml.Node, file: str, path: KeyPath, line_numbers: bool = True
) -> Node:
    origin = f"{file}:{node.start_mark.line + 1}" if line_numbers else file
    if not isinstance(node, yaml.MappingNode):
        value = loader.construct_object(node, deep=True)
        if is_slot(path) and isinstance(value, str) and value != MISSING:
            return Block({"name": Leaf(value, origin)}, origin)  # `kl_controller: fixed`
        return Leaf(value, origin)
    children: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            key = str(key_node.value)
        if key in children:
            raise UserError(
                f"{'.'.join((*path, key))} is given twice",
                where=f"{file}:{key_node.start_mark.line + 1}",
            )
        children[key] = _tree(loader, value_node, file, (*path, key), line_numbers)
    return Block(children, origin)


def is_slot(path: KeyPath) -> bool:
    """Whether a component sits at `path`: `algorithm` or `judge` itself, and slots below it."""
    return bool(path) and path[0] in COMPONENTS and path[-1] in SLOTS


def merge(base: Block, child: Block, path: KeyPath = ()) -> Block:
    """Both; the child wins. In a component, a child that changes a block's `name` replaces the
    whole block."""
    merged = dict(base.children)
    for key, node in child.children.items():
        old = merged.get(key)
        if (
            isinstance(old, Block)
            and isinstance(node, Block)
            and not _renamed(old, node, (*path, key))
        ):
            merged[key] = merge(old, node, (*path, key))
        else:
            merged[key] = node
    return Block(merged, child.origin)


def _renamed(old: Block, new: Block, path: KeyPath) -> bool:
    before, after = old.children.get("name"), new.children.get("name")
    if path[0] not in COMPONENTS or not isinstance(after, Leaf):
        return False
    return not isinstance(before, Leaf) or before.value != after.value


def plain(node: Node) -> Any:
    """The values alone."""
    if isinstance(node, Leaf):
        return node.value
    return {key: plain(child) for key, child in node.children.items()}


def leaves(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Leaf]]:
    """Every leaf with its path, in order."""
    if isinstance(node, Leaf):
        yield path, node
        return
    for key, child in node.children.items():
        yield from leaves(child, (*path, key))


def to_yaml(block: Block, origins: bool = True) -> str:
    """YAML that parses back to the same values; with `origins`, each line ends in a comment that
    says who wrote it."""
    lines: list[tuple[str, str]] = []

    def write(node: Block, indent: str) -> None:
        for key, child in node.children.items():
            if isinstance(child, Block) and child.children:
                lines.append((f"{indent}{key}:", ""))
                write(child, indent + "  ")
            else:
                value = {} if isinstance(child, Block) else child.value
                lines.append((f"{indent}{key}: {dump_value(value)}", child.origin))

    write(block, "")
    if not origins:
        return "".join(f"{text}\n" for text, _ in lines)
    width = min(60, max((len(text) for text, origin in lines if origin), default=0))
    return "".join(
        f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines
    )
