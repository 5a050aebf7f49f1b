"""JSON of a Hugging Face folder, with the type of every value that is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gipo_megatron.errors import UserError, short

LARGEST = 2**31  # of sizes and numbers: beyond it is a typing error
FIX = "take the file from the model's own repository"


@dataclass(frozen=True)
class Kind:
    """A type of value and its name in errors."""

    words: str
    fits: Callable[[Any], bool]

    def or_null(self) -> Kind:
        return Kind(f"{self.words} or null", lambda value: value is None or self.fits(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    number = _is_int(value) or isinstance(value, float)
    return number and 0 < value < LARGEST


def as_ids(value: Any) -> list[int]:
    """Return the token ids of a key: one, a list or none. Old files write -1 for none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return [number for number in ids if number != -1]


SIZE = Kind("a whole number above 0", lambda value: _is_int(value) and 0 < value < LARGEST)
NUMBER = Kind("a number above 0", _is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
BLOCK = Kind("an object", lambda value: isinstance(value, dict))
NAMES = Kind(
    "a list of texts", lambda value: isinstance(value, list) and all(map(TEXT.fits, value))
)
IDS = Kind(
    "a token id or a list of them", lambda value: all(_is_int(x) and x >= 0 for x in as_ids(value))
)
TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS)


def check_values(
    content: Mapping[str, Any], kinds: Mapping[str, Kind], where: str, block: str = ""
) -> None:
    """Raise UserError naming every key of `kinds` whose value is of another kind; absent keys are
    right. block: the key under which the object stands."""
    wrong = [
        f"{block}{key}: {short(content[key])} is not {kind.words}"
        for key, kind in kinds.items()
        if key in content and not kind.fits(content[key])
    ]
    if wrong:
        raise UserError("; ".join(wrong), where=where, fix=FIX)


def check_ids(content: Mapping[str, Any], vocab_size: int, where: str) -> None:
    """Raise UserError naming special tokens that have no row in the embedding."""
    ids = [(key, number) for key in TOKENS for number in as_ids(content.get(key))]
    if beyond := [f"{key}: {number}" for key, number in ids if number >= vocab_size]:
        raise UserError(
            f"{', '.join(beyond)} is not in the vocabulary (vocab_size {vocab_size})",
            where=where,
            fix="correct the id, or vocab_size in config.json",
        )
