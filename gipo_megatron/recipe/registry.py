"""Components by slot and name. A component is a dataclass; its fields are its recipe keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Range:
    """`Annotated[float, Range(0, 1)]`: low <= value <= high; with `open`, low < value."""

    low: float | None = None
    high: float | None = None
    open: bool = False

    def refuse(self, value: Any) -> str:
        """Why `value` is out of range; empty when it is not."""
        # negated, so that NaN is out of every range
        if self.low is not None and not (value > self.low if self.open else value >= self.low):
            return f"{value!r} must be {'above' if self.open else 'at least'} {self.low:g}"
        return (
            f"{value!r} must be at most {self.high:g}"
            if self.high is not None and value > self.high
            else ""
        )


@dataclasses.dataclass(frozen=True)
class OneOf:
    """`Annotated[str, OneOf("mass", "uniform")]`"""

    options: tuple[str, ...]

    def __init__(self, *options: str) -> None:
        object.__setattr__(self, "options", options)

    def refuse(self, value: Any) -> str:
        return "" if value in self.options else f"{value!r} is not one of {', '.join(self.options)}"


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

    Raises ValueError for an unknown slot or a name that is taken.
    """

    def add(cls: type[C]) -> type[C]:
        if slot not in SLOTS:
            raise ValueError(
                f"unknown slot {slot!r} for {cls.__name__}; slots are {', '.join(SLOTS)}"
            )
        if _registry.setdefault((slot, name), cls) is not cls:
            raise ValueError(
                f"{slot} {name!r} is taken by"
                f" {_registry[slot, name].__module__}.{_registry[slot, name].__name__}"
            )
        return cls

    return add


def from_runtime(name: str, optional: bool = False) -> Any:
    """A field that is no recipe key: training passes the object called `name` to the component.

    optional: a role that stays None unless a component of the recipe lists it in its `needs`.
    """
    metadata = {"runtime": name, "optional": optional}
    return dataclasses.field(default=None, metadata=metadata, repr=False)


def component(slot: str, default: str) -> Any:
    """A field that holds a component of `slot`; its recipe block is {name: …, keys …}."""
    return dataclasses.field(default=None, metadata={"slot": slot, "default": default})


def names(slot: str) -> list[str]:
    return sorted(name for s, name in _registry if s == slot)


def lookup(slot: str, name: str) -> type | None:
    return _registry.get((slot, name))


def recipe_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields a recipe may set (plain keys, not nested components and not runtime objects)."""
    return [f for f in dataclasses.fields(cls) if f.init and not f.metadata]


def component_fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if "slot" in f.metadata]


def runtime_fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if "runtime" in f.metadata]


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
    """Build the component that a (checked) recipe block describes, and its nested components.

    components: {field: component} that exist already. Raises ValueError when the runtime lacks an
    object that the component needs.
    """
    cls = _registry[slot, block["name"]]
    arguments: dict[str, Any] = {
        f.name: block[f.name] for f in recipe_fields(cls) if f.name in block
    }
    for f in runtime_fields(cls):
        if f.metadata["runtime"] not in runtime:
            raise ValueError(
                f"{slot} {block['name']!r} asks the runner for {f.metadata['runtime']!r}, which"
                " this recipe does not make"
            )
        arguments[f.name] = runtime[f.metadata["runtime"]]
    for f in component_fields(cls):
        if components is not None and f.name in components:
            arguments[f.name] = components[f.name]
            continue
        arguments[f.name] = build(
            f.metadata["slot"], block.get(f.name) or {"name": f.metadata["default"]}, runtime
        )
    return cls(**arguments)
