"""Components by slot and name. A component is a dataclass; its fields are its recipe keys."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

from gipo_megatron.specs import OneOf, Range

__all__ = [
    "OneOf",
    "Range",
    "build",
    "component",
    "from_runtime",
    "lookup",
    "register",
    "user_module",
]

C = TypeVar("C")
SLOTS = (
    "algorithm",
    "rollout",
    "reward",
    "group_classifier",
    "variance_regulariser",
    "kl_controller",
    "advantage",
    "judge",
)

_registry: dict[tuple[str, str], type] = {}


def register(slot: str, name: str) -> Callable[[type[C]], type[C]]:
    """Decorate a dataclass: `slot: {name: NAME, …}` in a recipe builds it from its fields.

    An algorithm declares `trained: ClassVar[tuple[str, ...]]`, the roles that it updates. A
    component may have
        needs         ClassVar[tuple[str, ...]]: roles that must be loaded for it
        min_responses ClassVar[int]: the least number of responses to a prompt
        needs_groups  ClassVar[bool]: it has no effect when all sequences are one group
        makes_groups  ClassVar[bool]: False for a classifier that makes one group of all sequences
        problems()    an iterator of UserError(what, where=key, fix=…) over keys that do not fit
                      together. Its object has recipe keys alone: __post_init__ has not run.

    Raises ValueError for an unknown slot, a name that is taken, or an algorithm without `trained`.
    """

    def add(cls: type[C]) -> type[C]:
        if slot not in SLOTS:
            known = ", ".join(SLOTS)
            raise ValueError(f"unknown slot {slot!r} for {cls.__name__}; slots are {known}")
        if slot == "algorithm" and not isinstance(getattr(cls, "trained", None), tuple):
            raise ValueError(
                f"{cls.__name__} needs `trained`, a tuple of the roles that it updates"
            )
        if (other := _registry.setdefault((slot, name), cls)) is not cls:
            raise ValueError(f"{slot} {name!r} is taken by {other.__module__}.{other.__name__}")
        return cls

    return add


def from_runtime(name: str, optional: bool = False, roles_key: str = "") -> Any:
    """A field that is not a recipe key: training passes the object called `name`.

    optional: a role that stays None unless a component of the recipe lists it in its `needs`, or,
    for `gold`, unless the recipe gives its weights.
    roles_key: the component's key that lists the models to load for it.
    """
    about = {"runtime": name, "optional": optional, "roles_key": roles_key}
    return dataclasses.field(default=None, metadata=about, repr=False)


def component(slot: str, default: str) -> Any:
    """A field that holds a component of `slot`; its recipe block is {name: …, keys …}."""
    return dataclasses.field(default=None, metadata={"slot": slot, "default": default})


def names(slot: str) -> list[str]:
    return sorted(name for s, name in _registry if s == slot)


def lookup(slot: str, name: Any) -> type | None:
    return _registry.get((slot, name)) if isinstance(name, str) else None


def recipe_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields a recipe may set (plain keys, not nested components and not runtime objects)."""
    return [f for f in dataclasses.fields(cls) if f.init and not f.metadata]


def component_fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if "slot" in f.metadata]


def runtime_fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if "runtime" in f.metadata]


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields, Annotated included."""
    return typing.get_type_hints(cls, include_extras=True)


class Lazy(Mapping[str, Any]):
    """Objects by name; each is made by its provider when it is first read, and kept."""

    def __init__(self, providers: Mapping[str, Callable[[], Any]]) -> None:
        self._providers, self._made = providers, dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._providers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the object
        return name in self._providers

    def __iter__(self) -> Iterator[str]:
        return iter(self._providers)

    def __len__(self) -> int:
        return len(self._providers)


def build(
    slot: str,
    block: Mapping[str, Any],
    runtime: Mapping[str, Any],
    components: Mapping[str, Any] | None = None,
) -> Any:
    """Build the component that a (checked) recipe block describes, with its nested components.

    components: {field: component} that exist already. Raises ValueError when `runtime` lacks an
    object that a component needs.
    """
    cls = _registry[slot, block["name"]]
    arguments: dict[str, Any] = {
        f.name: block[f.name] for f in recipe_fields(cls) if f.name in block
    }
    for f in runtime_fields(cls):
        name = f.metadata["runtime"]
        if name not in runtime:
            raise ValueError(
                f"{slot} {block['name']!r} needs {name!r}, which this recipe does not provide"
            )
        arguments[f.name] = runtime[name]
    for f in component_fields(cls):
        if components is not None and f.name in components:
            arguments[f.name] = components[f.name]
            continue
        nested = block.get(f.name) or {"name": f.metadata["default"]}
        arguments[f.name] = build(f.metadata["slot"], nested, runtime)
    return cls(**arguments)


def user_module(name: str) -> ModuleType:
    """Import a module that a recipe names: on the path or, as the last place, in the current
    folder, of which nothing is imported otherwise."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)
