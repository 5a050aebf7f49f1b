"""`${other.key}` and `${oc.env:NAME}`, replaced by their values: OmegaConf's interpolation."""

from __future__ import annotations

import functools
import re
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from gipo_megatron.recipe.problems import Problem, suggest
from gipo_megatron.recipe.source import Block, KeyPath, Leaf, Node, Unknown, leaves, plain

_ABSENT = re.compile(r"Interpolation key '(.*)' not found")


def resolve(tree: Block, problems: list[Problem]) -> Block:
    """Return the tree with all interpolations replaced; one without a value becomes Unknown.

    An interpolation may name any key that a file or the command line sets.
    """
    bare: dict[str, Any] = plain(tree)
    known = [".".join(path) for path, _ in leaves(tree)]
    found = [(path, leaf) for path, leaf in leaves(tree) if _interpolated(leaf.value)]
    values: dict[KeyPath, Any] = {}
    for path, leaf in found:
        try:
            OmegaConf.create({"value": leaf.value})
        except OmegaConfBaseException as error:  # not even an expression
            values[path] = _unknown(path, leaf, error, problems, known)
            _set(bare, path, None)
    config = OmegaConf.create(bare)
    for path, leaf in found:
        if path not in values:
            try:
                value = functools.reduce(lambda node, key: node[key], path, config)
                block = OmegaConf.is_config(value)
                values[path] = OmegaConf.to_container(value, resolve=True) if block else value
            except OmegaConfBaseException as error:
                values[path] = _unknown(path, leaf, error, problems, known)
    return _replaced(tree, values)


def _unknown(
    path: KeyPath,
    leaf: Leaf,
    error: OmegaConfBaseException,
    problems: list[Problem],
    known: list[str],
) -> Unknown:
    """Add the problem, but for a target without a value: that key has the problem itself."""
    if isinstance(error, InterpolationToMissingValueError):
        return Unknown(f"{leaf.value!r} has no value: the key that it names is not set")
    reason = str(error).splitlines()[0]
    what = f"cannot resolve {leaf.value!r}: {reason}"
    absent = _ABSENT.fullmatch(reason)
    fix = suggest(absent[1], known) if absent else ""
    problems.append(Problem(".".join(path), what, leaf.origin, fix, absent=True))
    return Unknown(what)


def _interpolated(value: Any) -> bool:
    if isinstance(value, list):
        return any(_interpolated(item) for item in value)
    if isinstance(value, dict):
        return any(_interpolated(item) for item in value.values())
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
