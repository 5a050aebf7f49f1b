"""Values of YAML and JSON as the types of a dataclass's fields, with their ranges."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from gipo_megatron import registry
from gipo_megatron.errors import UserError, short
from gipo_megatron.files import expand
from gipo_megatron.specs import OneOf, Place, Range

T = TypeVar("T")
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    list: "a list",
    dict: "a block of keys",
}
LARGEST = 2**63 - 1  # of whole numbers: tensors and generators take no larger ones


class Mismatch(Exception):
    """A value that does not fit its type or range. key: where it is in a block, dotted."""

    def __init__(self, why: str, key: str = "") -> None:
        super().__init__(f"{key}: {why}" if key else why)
        self.why, self.key = why, key


def built(cls: type[T], content: Mapping[str, Any]) -> T:
    """Return the dataclass with these values of its fields. Raises Mismatch with the key at
    fault."""
    kind: Any = cls
    hints = registry.hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in content:
        if key not in known:
            raise Mismatch("unknown key", str(key))
    for name, field in known.items():
        if name not in content and field.default is field.default_factory is dataclasses.MISSING:
            raise Mismatch("missing", name)
    values = {key: _at(key, value, hints[key]) for key, value in content.items()}
    try:
        return cls(**values)
    except UserError as error:
        raise Mismatch(error.what, error.where.rsplit(".", 1)[-1]) from None


def _at(key: str, value: Any, hint: Any) -> Any:
    try:
        return convert(value, hint)
    except Mismatch as mismatch:
        inner = f".{mismatch.key}" if mismatch.key else ""
        raise Mismatch(mismatch.why, f"{key}{inner}") from None


def convert(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`: an int may become a float, a list a tuple, a dict a
    dataclass; nothing else changes. Raises Mismatch."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        converted = convert(value, arguments[0])
        for mark in arguments[1:]:
            if isinstance(mark, Place):
                converted = _expand(converted)
            if isinstance(mark, Range | OneOf) and (why := mark.refuse(converted)):
                raise Mismatch(why)
        return converted
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, hint)
    if hint is Any or (hint is dict and isinstance(value, dict)):
        return value
    counted = origin is tuple and arguments[-1] is not ...
    right = not counted or (isinstance(value, list | tuple) and len(value) == len(arguments))
    if origin in (list, tuple) and isinstance(value, list | tuple) and right:
        return origin(convert(item, arguments[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {convert(k, arguments[0]): _at(k, v, arguments[1]) for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return built(typing.cast(type, hint), value)
    if hint in (int, float) and type(value) in (int, hint):
        return _number(value, hint)
    if hint in KINDS and type(value) is hint:
        return value
    raise Mismatch(f"needs {spell(hint)}, not {_describe(value)}")


def _number(value: float, hint: Any) -> Any:
    """Return a number that tensors can hold."""
    if isinstance(value, int) and abs(value) > LARGEST:
        raise Mismatch(f"{short(value)} is too large: whole numbers go up to 2^63 - 1")
    if not math.isfinite(value):
        raise Mismatch(f"{value} is not finite")
    return hint(value)


def _expand(path: str) -> str:
    try:
        return expand(path)
    except UserError as error:
        raise Mismatch(f"{error.what}; {error.fix}".removesuffix("; ")) from None


def options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; a type that is no union alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _convert_union(value: Any, hint: Any) -> Any:
    if value is None and type(None) in options(hint):
        return None
    found = [option for option in options(hint) if option is not type(None)]
    for option in found:
        try:
            return convert(value, option)
        except Mismatch as mismatch:
            if len(found) == 1 and (mismatch.key or "needs" not in mismatch.why):
                raise
    raise Mismatch(f"needs {spell(hint)}, not {_describe(value)}")


def spell(hint: Any) -> str:
    """Return a type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return spell(arguments[0])
    if len(options(hint)) > 1:
        return " or ".join(spell(option) for option in options(hint))
    if origin in (list, tuple):
        return f"a list of {spell(arguments[0])}"
    if origin is dict:
        return KINDS[dict]
    return "blocks of keys" if dataclasses.is_dataclass(hint) else KINDS.get(hint, str(hint))


def _describe(value: Any) -> str:
    return "null" if value is None else f"{short(value)} ({KINDS.get(type(value), 'a value')})"
