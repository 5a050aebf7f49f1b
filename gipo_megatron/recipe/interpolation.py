"""`${other.key}` and `${oc.env:NAME}` (OmegaConf's syntax), replaced by their values."""

from __future__ import annotations

import os
import re
from typing import Any

from gipo_megatron.recipe.problems import Problem, suggest
from gipo_megatron.recipe.source import (
    MISSING,
    Block,
    KeyPath,
    Leaf,
    Node,
    Unknown,
    dump_value,
    leaves,
)

_POINTER = re.compile(r"\$\{([^${}]*)\}")
_ENVIRONMENT = "oc.env:"


class _Unresolvable(Exception):
    """The text cannot be resolved."""


class _Unset(Exception):
    """The key it points at has no value: that key has the problem."""


def resolve(
    tree: Block, problems: list[Problem], path: KeyPath = (), root: Block | None = None
) -> Block:
    """Return the tree with all pointers replaced; one without a value becomes Unknown.

    A pointer may name any key that a file or the command line sets.
    """
    root = root or tree
    children: dict[str, Node] = {}
    for name, node in tree.children.items():
        below = (*path, name)
        if isinstance(node, Block):
            children[name] = resolve(node, problems, below, root)
        else:
            children[name] = _resolved(node, problems, ".".join(below), root)
    return Block(children, tree.origin)


def _resolved(leaf: Leaf, problems: list[Problem], key: str, root: Block) -> Leaf:
    try:
        return Leaf(_value(leaf.value, root, (key,)), leaf.origin)
    except _Unset as unset:
        return Leaf(Unknown(f"{leaf.value!r} has no value: {unset}"), leaf.origin)
    except _Unresolvable as error:
        what = f"cannot resolve {leaf.value!r}: {error}"
        problems.append(Problem(key, what, leaf.origin, absent=True))
        return Leaf(Unknown(what), leaf.origin)


def _value(value: Any, root: Block, chain: tuple[str, ...]) -> Any:
    """`value` with its pointers replaced; `chain`: the keys that led here."""
    if isinstance(value, list):
        return [_value(item, root, chain) for item in value]
    if isinstance(value, dict):
        return {key: _value(item, root, chain) for key, item in value.items()}
    if not isinstance(value, str) or "${" not in value:
        return value
    if whole := _POINTER.fullmatch(value):
        return _target(whole[1], root, chain)
    if "${" in _POINTER.sub("", value):
        raise _Unresolvable("write ${key.path} or ${oc.env:NAME}")
    return _POINTER.sub(lambda found: _text(_target(found[1], root, chain)), value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else dump_value(value)


def _target(name: str, root: Block, chain: tuple[str, ...]) -> Any:
    if name.startswith(_ENVIRONMENT):
        variable, comma, default = name.removeprefix(_ENVIRONMENT).partition(",")
        if variable not in os.environ and not comma:
            raise _Unresolvable(f"the environment variable {variable} is not set")
        return os.environ.get(variable, default)
    if name in chain:
        raise _Unresolvable(f"a cycle: {' → '.join((*chain, name))}")
    node = root.at(name)
    if isinstance(node, Block):
        raise _Unresolvable(f"{name} is a block of keys")
    if node is None:
        known = [".".join(path) for path, _ in leaves(root)]
        raise _Unresolvable(f"no file sets {name!r}; {suggest(name, known)}")
    if node.value == MISSING:
        raise _Unset(f"{name} is not set")
    return _value(node.value, root, (*chain, name))
