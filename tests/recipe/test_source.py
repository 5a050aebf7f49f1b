from __future__ import annotations

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.source import (
    Block,
    Leaf,
    dump_value,
    leaves,
    merge,
    parse_value,
    parse_yaml,
    plain,
    to_yaml,
)


def test_scalars_are_yaml_1_2() -> None:
    text = (
        "a: 1e-3\nb: yes\nc: 1_000\nd: .5\ne: null\nf: 010\ng: '1e-3'\nh: none\ni: true\nj: -2\nk:"
        " 2024-01-01\nl:\n"
    )
    expected = {
        "a": 1e-3,
        "b": "yes",
        "c": 1000,
        "d": 0.5,
        "e": None,
        "f": "010",
        "g": "1e-3",
        "h": "none",
    }
    assert plain(parse_yaml(text, "f")) == {
        **expected,
        "i": True,
        "j": -2,
        "k": "2024-01-01",
        "l": None,
    }


def test_every_leaf_knows_its_line() -> None:
    tree = parse_yaml("a: 1\nb:\n  c: [1,\n    2]\n  d: {e: x}\n", "f.yaml")
    assert [(path, leaf.origin) for path, leaf in leaves(tree)] == [
        (("a",), "f.yaml:1"),
        (("b", "c"), "f.yaml:3"),
        (("b", "d", "e"), "f.yaml:5"),
    ]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: 1\nb: {c: ${x}}\n", "f:2", "not valid YAML"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "f:4", "b.c is set twice"),
        ("- a\n", "f", "mapping"),
    ],
)
def test_unreadable_text_names_the_line(text: str, where: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f")
    assert caught.value.where == where
    assert what in caught.value.what


def test_a_word_at_a_slot_is_a_component_and_elsewhere_text() -> None:
    tree = plain(
        parse_yaml(
            "algorithm: {kl_controller: fixed, reward: {name: model}}\nmodels: {reward: runs/x}\n",
            "f",
        )
    )
    assert tree["algorithm"]["kl_controller"] == {"name": "fixed"}
    assert tree["models"]["reward"] == "runs/x"
    assert parse_value("none", ("algorithm", "kl_controller"), "o") == Block(
        {"name": Leaf("none", "o")}, "o"
    )
    assert parse_value("", ("data", "path"), "o") == Leaf("", "o")


def test_merge_is_deep_and_the_child_wins() -> None:
    base = parse_yaml("a: {b: 1, c: 2}\nd: [1, 2]\n", "base")
    child = parse_yaml("a: {c: 3}\nd: [4]\n", "child")
    merged = merge(base, child)
    assert plain(merged) == {"a": {"b": 1, "c": 3}, "d": [4]}
    assert {path: leaf.origin for path, leaf in leaves(merged)} == {
        ("a", "b"): "base:1",
        ("a", "c"): "child:1",
        ("d",): "child:2",
    }


def test_another_name_replaces_the_block_and_the_same_name_does_not() -> None:
    base = parse_yaml(
        "algorithm: {name: ppo, clip: 0.1, kl_controller: {name: group_adaptive, eta: 0.1, floor:"
        " 0.2}}\n",
        "base",
    )
    other = merge(base, parse_yaml("algorithm: {kl_controller: {name: fixed}}\n", "child"))
    same = merge(
        base, parse_yaml("algorithm: {kl_controller: {name: group_adaptive, eta: 0.3}}\n", "child")
    )
    assert plain(other)["algorithm"] == {
        "name": "ppo",
        "clip": 0.1,
        "kl_controller": {"name": "fixed"},
    }
    assert plain(same)["algorithm"]["kl_controller"] == {
        "name": "group_adaptive",
        "eta": 0.3,
        "floor": 0.2,
    }
    assert plain(merge(base, parse_yaml("algorithm: {name: sft}\n", "child"))) == {
        "algorithm": {"name": "sft"}
    }
    assert plain(
        merge(parse_yaml("data: {name: a, x: 1}\n", "b"), parse_yaml("data: {name: b}\n", "c"))
    ) == {"data": {"name": "b", "x": 1}}


def test_yaml_comes_back_equal() -> None:
    values = [
        "1e-3",
        "yes",
        "none",
        "null",
        "",
        "a: b",
        "${x}",
        1e-6,
        5e-7,
        1.0,
        10**12,
        True,
        None,
        [],
        ["a", 1],
        {},
        "line\nline",
        "it's",
    ]
    for value in values:
        assert plain(parse_yaml(f"a: {dump_value(value)}\n", "f"))["a"] == value, value
    tree = parse_yaml(
        "".join(f"k{i}: {dump_value(v)}\n" for i, v in enumerate(values)) + "b: {c: {d: 1}}\n", "f"
    )
    for origins in (True, False):
        assert plain(parse_yaml(to_yaml(tree, origins), "g")) == plain(tree)
