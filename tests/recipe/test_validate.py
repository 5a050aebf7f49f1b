from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from gipo_megatron.errors import UserError
from gipo_megatron.recipe.source import parse_yaml, plain
from gipo_megatron.recipe.validate import Validation
from gipo_megatron.registry import component, from_runtime, register
from gipo_megatron.specs import OneOf, Range
from gipo_megatron.typed import Mismatch, convert


@register("judge", "test_strict")
@dataclass
class Strict:
    beta: float = 0.3
    low: float = 0.0
    high: float = 1.0
    dp: Any = from_runtime("dp")

    def __post_init__(self) -> None:
        self.size = self.dp.size * 2  # only exists in a run

    def problems(self) -> Iterator[UserError]:
        if self.beta < 0:
            yield UserError(f"beta is {self.beta}", where="judge.beta", fix="at least 0")
        if self.low > self.high:
            yield UserError(f"low {self.low} exceeds high {self.high}")


@register("judge", "test_loose")
@dataclass
class Loose:
    gamma: Annotated[float, Range(0, 1)] = 1.0


@dataclass
class Inner:
    mode: Annotated[str, OneOf("a", "b")] = "a"
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class Section:
    count: int
    rate: float = 0.5
    limit: Annotated[float, Range(0, open=True)] | None = None
    names: list[str] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    each: dict[str, Inner] = field(default_factory=dict)
    judge: dict[str, Any] = component("judge", "test_strict")


def problems_of(text: str) -> list[str]:
    """`key: what` of each problem."""
    validation = Validation()
    validation.block(parse_yaml(text, "f"), Section)
    return [f"{p.key} @{p.where}: {p.what} {p.fix}".strip() for p in validation.problems]


def test_defaults_are_filled_in_and_remember_that_nobody_wrote_them() -> None:
    validation = Validation()
    tree, section = validation.block(
        parse_yaml("count: 3\ninner: {columns: {chosen: a.b}}\neach: {x: {mode: b}}\n", "f"),
        Section,
    )
    assert not validation.problems
    assert plain(tree) == {
        "count": 3,
        "rate": 0.5,
        "limit": None,
        "names": [],
        "inner": {"mode": "a", "columns": {"chosen": "a.b"}},
        "each": {"x": {"mode": "b", "columns": {}}},
        "judge": {"name": "test_strict", "beta": 0.3, "low": 0.0, "high": 1.0},
    }
    assert tree.children["rate"].origin == "default"
    assert (section["inner"], section["each"]) == (
        Inner(columns={"chosen": "a.b"}),
        {"x": Inner(mode="b")},
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count: 1\nrte: 1\n", ["rte @f:2: unknown key did you mean 'rate'?"]),
        ("rate: 1\n", ["count @f:1: missing set it in the recipe, or count=…"]),
        ("count: ???\n", ["count @f:1: missing set it in the recipe, or count=…"]),
        ("count: 1.5\n", ["count @f:1: needs a whole number, not 1.5 (a number)"]),
        ("count: true\n", ["count @f:1: needs a whole number, not True (true or false)"]),
        ("count: 1\nrate: high\n", ["rate @f:2: needs a number, not 'high' (text)"]),
        ("count: 1\nlimit: 0\n", ["limit @f:2: 0.0 must be above 0"]),
        ("count: 1\nlimit: x\n", ["limit @f:2: needs a number or null, not 'x' (text)"]),
        ("count: 1\nnames: a\n", ["names @f:2: needs a list of text, not 'a' (text)"]),
        ("count: 1\nnames: [a, 1]\n", ["names @f:2: needs text, not 1 (a whole number)"]),
        ("count: {a: 1}\n", ["count @f:1: needs a whole number, not a block of keys"]),
        ("count: 1\ninner: 3\n", ["inner @f:2: must be a block of keys, not 3"]),
        ("count: 1\ninner: {mode: c}\n", ["inner.mode @f:2: 'c' is not one of a, b"]),
        ("count: 1\neach: {x: {mod: a}}\n", ["each.x.mod @f:2: unknown key did you mean 'mode'?"]),
        (
            "count: 1\njudge: {name: test_strct}\n",
            ["judge.name @f:2: there is no judge 'test_strct' did you mean 'test_strict'?"],
        ),
        (
            "count: 1\njudge: {name: test_loose, beta: 1}\n",
            ["judge.beta @f:2: this judge does not read it read by: test_strict"],
        ),
        (
            "count: 1\njudge: {name: test_loose, gamma: 2}\n",
            ["judge.gamma @f:2: 2.0 must be at most 1"],
        ),
        ("count: 1\njudge: {beta: -1}\n", ["judge.beta @f:2: beta is -1.0 at least 0"]),
        ("count: 1\njudge:\n  low: 2\n", ["judge @f:3: low 2.0 exceeds high 1.0"]),
    ],
)
def test_each_mistake_is_named_once(text: str, expected: list[str]) -> None:
    assert problems_of(text) == expected


def test_all_mistakes_come_together() -> None:
    found = problems_of("cout: 1\nrate: x\njudge: {gamma: 1}\ninner: {mode: c}\n")
    assert [line.split(" ")[0] for line in found] == [
        "cout",
        "count",
        "rate",
        "inner.mode",
        "judge.gamma",
    ]


def test_numbers_convert_one_way_only() -> None:
    assert convert(1, float) == 1.0 and type(convert(1, float)) is float
    assert convert([1, 2], tuple[int, ...]) == (1, 2)
    for value, hint in (
        (1.0, int),
        (1, bool),
        (True, int),
        (True, float),
        ("1", int),
        (1, str),
        (None, str),
        ({}, list[str]),
    ):
        with pytest.raises(Mismatch):
            convert(value, hint)


def test_blocks_are_kept_in_the_order_of_the_fields() -> None:
    tree, _ = Validation().block(parse_yaml("rate: 1\ncount: 2\n", "f"), Section)
    assert list(tree.children)[:2] == ["count", "rate"]
