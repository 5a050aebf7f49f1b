"""The command line of the two converters: key=value words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gipo_megatron.errors import UserError
from gipo_megatron.files import expand

BOOLEANS = dict.fromkeys(("verify", "merge"), ("true", "false"))


def arguments(
    argv: Sequence[str], required: Sequence[str], optional: Mapping[str, str]
) -> dict[str, str]:
    """Return key=value words as a dictionary, with defaults. Raises UserError for an unknown or a
    missing key."""
    words = dict(optional)
    known = ", ".join(
        [*(f"{key}=…" for key in required), *(f"{key}={value}" for key, value in optional.items())]
    )
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or not value or (key not in required and key not in optional):
            raise UserError(f"unknown word {word!r}", where="command line", fix=known)
        if key in BOOLEANS and value not in BOOLEANS[key]:
            raise UserError(f"{key} is true or false, not {value!r}", where="command line")
        words[key] = expand(value)
    if missing := [key for key in required if key not in words]:
        raise UserError(
            f"missing: {', '.join(f'{key}=…' for key in missing)}", where="command line", fix=known
        )
    return words
