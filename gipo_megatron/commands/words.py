"""The command line of the two converters: key=value words, messages on one screen, quiet
libraries."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence

from gipo_megatron.errors import UserError

BOOLEANS = {"verify": ("true", "false")}


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
        words[key] = value
    if missing := [key for key in required if key not in words]:
        raise UserError(
            f"missing: {', '.join(f'{key}=…' for key in missing)}", where="command line", fix=known
        )
    return words


def run(main: Callable[[list[str]], None], usage: str | None, argv: list[str]) -> int:
    """Return 0 when done, 2 after a UserError, printed without a traceback, 130 after Ctrl-C."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        main(argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was left under the final name", file=sys.stderr)
        return 130
    return 0
