"""Shipped recipes with one key deleted, misspelt, retyped or nested: each is a valid recipe or a
list of problems, never a traceback."""

from __future__ import annotations

import contextlib
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation import recipe as evaluation
from gipo_megatron.recipe.compose import checked
from gipo_megatron.recipe.files import Files, recipe_names
from gipo_megatron.recipe.problems import RecipeErrors, fail
from gipo_megatron.recipe.source import Block, KeyPath, Leaf, Node, plain
from tests.recipe.helpers import RECIPES
from tests.smollm import beside_the_model

VALUES = ("text", -7, 2.5, True, None, [], [1], {"a": 1}, "???", "${", "${no.where}")
OPERATIONS = ("delete", "misspell", "retype", "nest")


@functools.cache
def merged(name: str) -> Block:
    """The recipe with its defaults, as the files have it."""
    return Files(RECIPES).load(RECIPES / f"{name}.yaml")


def paths(node: Node, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key, blocks included."""
    if isinstance(node, Block):
        for key, child in node.children.items():
            yield (*path, key)
            yield from paths(child, (*path, key))


def changed(node: Block, path: KeyPath, change: Callable[[str, Node], dict[str, Node]]) -> Block:
    """The tree with the key at `path` replaced by the keys that `change` returns."""
    children: dict[str, Node] = {}
    for key, child in node.children.items():
        if key != path[0]:
            children[key] = child
        elif len(path) == 1:
            children |= change(key, child)
        else:
            assert isinstance(child, Block)
            children[key] = changed(child, path[1:], change)
    return Block(children, node.origin)


def mutated(tree: Block, path: KeyPath, operation: str, value: Any) -> Block:
    changes: dict[str, Callable[[str, Node], dict[str, Node]]] = {
        "delete": lambda key, node: {},
        "misspell": lambda key, node: {f"{key}x": node},
        "retype": lambda key, node: {key: Leaf(value, node.origin)},
        "nest": lambda key, node: {key: Block({key: node}, node.origin)},
    }
    return changed(tree, path, changes[operation])


def names_the_key(error: RecipeErrors, path: KeyPath, operation: str) -> bool:
    """A misspelt key is named itself, a deleted one at least its section, another its last part."""
    text = str(error)
    if operation == "misspell":
        return f"{path[-1]}x" in text
    related = any(problem.key.split(".")[0] == path[0] for problem in error.problems)
    return path[-1] in text or (operation == "delete" and related)


@pytest.fixture(autouse=True, scope="module")
def offline() -> Iterator[None]:
    """No network, and the model of recipes/smollm beside them."""
    with pytest.MonkeyPatch.context() as patch, beside_the_model():
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("RANK", raising=False)
        yield


OUTCOMES: Counter[str] = Counter()


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_a_mutated_recipe_is_valid_or_names_its_key(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(recipe_names(RECIPES)))
    path = data.draw(st.sampled_from(sorted(paths(merged(name)))))
    operation = data.draw(st.sampled_from(OPERATIONS))
    value = data.draw(st.sampled_from(VALUES)) if operation == "retype" else None
    tree = mutated(merged(name), path, operation, value)
    make = evaluation.checked if "policies" in merged(name).children else checked
    try:
        recipe = make(tree, name)
    except UserError as error:
        OUTCOMES["refused"] += 1
        assert isinstance(error, RecipeErrors)
        assert names_the_key(error, path, operation), f"{name} {path} {operation} {value}: {error}"
        with contextlib.redirect_stderr(io.StringIO()) as shown, pytest.raises(SystemExit) as left:
            fail(error)
        assert left.value.code == 2 and str(error) in shown.getvalue()
    else:
        OUTCOMES["valid"] += 1
        assert plain(recipe.tree)


def test_both_outcomes_are_common() -> None:
    """Runs after the test above."""
    assert OUTCOMES["valid"] > 50 and OUTCOMES["refused"] > 200, OUTCOMES
