"""YAML text as a tree whose nodes remember the file and line they were written in."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from gipo_megatron.errors import UserError
from gipo_megatron.registry import SLOTS

DEFAULT = "default"  # origin of a value that no file sets
COMMAND_LINE = "command line"  # origin of a value set there
MISSING = "???"  # a value that a child recipe must set
COMPONENTS = ("algorithm", "judge", "rollout")  # sections that are components themselves
DEEPEST = 32  # blocks and lists within each other


@dataclass(frozen=True)
class Unknown:
    """The value of a leaf that depends on a key with a problem of its own."""

    why: str  # reported where nothing else is


@dataclass(frozen=True)
class Leaf:
    value: Any  # a scalar, a list, or a dict that is one value
    origin: str


@dataclass(frozen=True)
class Block:
    children: Mapping[str, Node]
    origin: str

    def at(self, key: str) -> Node | None:
        """The node at a dotted key; None where there is none."""
        node: Node | None = self
        for part in key.split("."):
            node = node.children.get(part) if isinstance(node, Block) else None
        return node

    def value(self, key: str) -> Any:
        """The value of the leaf at a dotted key; MISSING where there is none."""
        node = self.at(key)
        return node.value if isinstance(node, Leaf) else MISSING

    def origin_of(self, key: str) -> str:
        """The origin of the node at a dotted key; empty where there is none."""
        node = self.at(key)
        return "" if node is None else node.origin

    def written(self, key: str) -> bool:
        """Return whether a file or the command line sets the key."""
        return self.origin_of(key) not in ("", DEFAULT)


Node = Leaf | Block
KeyPath = tuple[str, ...]


class _Loader(yaml.CSafeLoader):
    """YAML 1.2 scalars: `1e-3` is a number; yes, no, on, off and dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    ignore_aliases = lambda self, data: True  # noqa: E731  (no anchors)


_FLOAT = r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
_SCALARS = (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]{0,999})$", "-+0123456789"),  # Python reads 4300 digits
    ("float", _FLOAT, "-+.0123456789"),
    ("null", r"^(?:~|null|Null|)$", ["~", "n", "N", ""]),
)
for _cls in (_Loader, _Dumper):
    for _tag, _pattern, _first in _SCALARS:
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def dump_value(value: Any) -> str:
    """Return one line of YAML that parses back to `value`."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        allow_unicode=True,
        width=10**9,
        sort_keys=False,
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _composed(text: str) -> tuple[_Loader, yaml.Node | None]:
    """Raises yaml.YAMLError, also for what no recipe needs: an alias (six lines of them can stand
    for a million keys, and one can contain itself), a tag, and a depth that ends the reader."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        problem = ""
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            problem = f"an alias, *{event.anchor}: write ${{other.key}} in its place"
        elif tag := getattr(event, "tag", None):
            problem = f"a tag, {tag}: write the value alone"
        elif depth > DEEPEST:
            problem = f"more than {DEEPEST} blocks and lists within each other"
        if problem:
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
    loader = _Loader(text)
    return loader, loader.get_single_node()


def parse_yaml(text: str, file: str) -> Block:
    """Return the tree of one file.

    Raises UserError with file and line when the text is not YAML, not a mapping, or sets a key
    twice.
    """
    try:
        loader, node = _composed(text)
        if node is None:
            return Block({}, file)
        if not isinstance(node, yaml.MappingNode):
            raise UserError("a recipe is a mapping of keys to values", where=file)
        tree = _tree(loader, node, file, ())
        assert isinstance(tree, Block)
        return tree
    except yaml.YAMLError as error:
        mark: yaml.Mark | None = getattr(error, "problem_mark", None)
        raise UserError(
            f"not valid YAML: {getattr(error, 'problem', error)}",
            where=f"{file}:{mark.line + 1}" if mark else file,
            fix='inside {…} quote "${…}", "???" and text with colons',
        ) from None


def parse_value(text: str, path: KeyPath, origin: str) -> Node:
    """Return the value of `key=text`; nothing after `=` is the empty string. Raises UserError."""
    if text == "":
        return Leaf("", origin)
    try:
        loader, node = _composed(text)
        if node is None:
            return Leaf(text, origin)
        plain = isinstance(node, yaml.ScalarNode) and not node.style
        if not plain or node.value == text.strip():
            return _tree(loader, node, origin, path, line_numbers=False)
        what = f"YAML reads {text!r} as {node.value!r}"
    except UnicodeEncodeError:
        fix = "export PYTHONUTF8=1, or write it in the locale's encoding"
        what = f"{text!r} is not in the locale's encoding"
        raise UserError(what, where=origin, fix=fix) from None
    except yaml.YAMLError:
        what = f"cannot read the value {text!r}"
    raise UserError(what, where=origin, fix=quoted(".".join(path), text))


def quoted(key: str, text: str) -> str:
    """Return the advice how to give a key this very text on the command line."""
    word = f"{key}={json.dumps(text, ensure_ascii=False)}"
    return f"quote it for the shell and for YAML: {shlex.quote(word)}"


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
            where = f"{file}:{key_node.start_mark.line + 1}"
            raise UserError(f"{'.'.join((*path, key))} is set twice", where=where)
        children[key] = _tree(loader, value_node, file, (*path, key), line_numbers)
    return Block(children, origin)


def is_slot(path: KeyPath) -> bool:
    """Return whether `path` holds a component: one of COMPONENTS, or a slot below."""
    return bool(path) and path[0] in COMPONENTS and path[-1] in SLOTS


def merge(base: Block, child: Block, path: KeyPath = ()) -> Block:
    """Return both; the child wins. A child that changes a component's `name` replaces its whole
    block."""
    merged = dict(base.children)
    for key, node in child.children.items():
        old, below = merged.get(key), (*path, key)
        if isinstance(old, Block) and isinstance(node, Block):
            renamed = "name" in node.children and old.value("name") != node.value("name")
            merged[key] = node if renamed and below[0] in COMPONENTS else merge(old, node, below)
        else:
            merged[key] = node
    return Block(merged, child.origin)


def plain(node: Node) -> Any:
    """Return the values without their origins."""
    if isinstance(node, Leaf):
        return node.value
    return {key: plain(child) for key, child in node.children.items()}


def leaves(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Leaf]]:
    """Yield every leaf with its path, in order."""
    if isinstance(node, Leaf):
        yield path, node
        return
    for key, child in node.children.items():
        yield from leaves(child, (*path, key))


def to_yaml(block: Block, origins: bool = True) -> str:
    """Return YAML that parses back to the same values; with `origins`, a comment after each line
    names the file and line that set it."""
    lines: list[tuple[str, str]] = []

    def write(node: Block, indent: str) -> None:
        for key, child in node.children.items():
            if isinstance(child, Block) and child.children:
                lines.append((f"{indent}{key}:", ""))
                write(child, indent + "  ")
            else:
                lines.append((f"{indent}{key}: {dump_value(plain(child))}", child.origin))

    write(block, "")
    if not origins:
        return "".join(f"{text}\n" for text, _ in lines)
    width = min(60, max((len(text) for text, origin in lines if origin), default=0))
    return "".join(
        f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines
    )
