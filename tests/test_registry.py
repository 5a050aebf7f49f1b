from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from gipo_megatron import registry
from gipo_megatron.registry import build, component, from_runtime, register
from gipo_megatron.specs import OneOf, Range


@register("judge", "test_inner")
@dataclass
class Inner:
    k: int = 1
    dp: object = from_runtime("dp")


@register("algorithm", "test_outer")
@dataclass
class Outer:
    trained: ClassVar[tuple[str, ...]] = ("actor",)

    x: float = 0.5
    judge: Inner = component("judge", "test_inner")
    actor: object = from_runtime("actor")
    memory: list[int] = field(default_factory=list, init=False)


def test_build_gives_keys_nested_components_and_runtime_objects() -> None:
    outer = build(
        "algorithm",
        {"name": "test_outer", "x": 2.0, "judge": {"name": "test_inner", "k": 3}},
        {"actor": "A", "dp": "D"},
    )
    assert (outer.x, outer.actor, outer.judge.k, outer.judge.dp) == (2.0, "A", 3, "D")
    assert build("algorithm", {"name": "test_outer"}, {"actor": "A", "dp": "D"}).judge.k == 1


def test_a_missing_runtime_object_is_named() -> None:
    with pytest.raises(ValueError, match="'dp'"):
        build("algorithm", {"name": "test_outer"}, {"actor": "A"})


def test_names_are_unique_and_slots_known() -> None:
    with pytest.raises(ValueError, match="is taken by"):
        register("judge", "test_inner")(Outer)
    with pytest.raises(ValueError, match="unknown slot"):
        register("jury", "x")(Outer)
    with pytest.raises(ValueError, match="needs `trained`"):
        register("algorithm", "x")(Inner)
    assert "test_inner" in registry.names("judge")


def test_recipe_fields_are_neither_components_nor_runtime_nor_memory() -> None:
    assert [f.name for f in registry.recipe_fields(Outer)] == ["x"]


@pytest.mark.parametrize(
    ("mark", "good", "bad"),
    [
        (Range(0, 1), 1, 1.1),
        (Range(0, 1), 0, -0.1),
        (Range(0, open=True), 1e-9, 0),
        (Range(high=2), -5, 3),
        (OneOf("a", "b"), "b", "c"),
    ],
)
def test_marks(mark: Range | OneOf, good: object, bad: object) -> None:
    assert mark.refuse(good) == ""
    assert repr(bad) in mark.refuse(bad)
