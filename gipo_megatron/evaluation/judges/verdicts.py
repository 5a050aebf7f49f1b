"""A judge's verdict in a text, as [[A]] or as a JSON object with the key `verdict`.

Both forms are read in every text: a server may leave the requested form out.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from gipo_megatron.evaluation.types import FIRST, SECOND, TIE

VERDICTS = {"A": FIRST, "B": SECOND, "C": TIE}
# tags of thoughts: <think>, <thinking>, <seed:think>, [THINK], …
_NAME = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning)"
OPENED = re.compile(rf"\s*[<\[]{_NAME}[>\]]", re.IGNORECASE)
# a verdict, what may be an object, the end of thoughts
_MARK = re.compile(rf"\[\[(?P<token>[ABC])\]\]|(?P<object>\{{(?=\s*\x22))|[<\[]/(?i:{_NAME})[>\]]")
_OURS = re.compile(r'\{\s*"(explanation|verdict)"')
_DECODER = json.JSONDecoder(strict=False)  # a string may contain line breaks
# objects that are no JSON, after which objects are passed over: each takes as long as the text
_UNREADABLE = 100


class Reading(NamedTuple):
    """`choice`: FIRST, SECOND, TIE or None, by the last verdict. `start`: of the text after the
    thoughts. `end`: of the verdict."""

    choice: str | None = None
    start: int = 0
    end: int = 0


def read(text: str, form: str = "") -> Reading:
    """Return the last verdict after the thoughts; `form`: that was requested, if one was.

    What an object contains is no verdict, and what follows an object that is cut or no JSON is
    one only within another object: its explanation may quote [[A]]. Where JSON was requested, so
    may words after an object with a verdict.
    """
    found, at, quoted, failed = Reading(), 0, False, 0
    while mark := _MARK.search(text, at):
        at = mark.end()
        if mark["object"]:
            value, end = _object(text, mark.start()) if failed < _UNREADABLE else ({}, 0)
            failed += not value
            if "verdict" in value:
                letter, at = value["verdict"], end
                choice = VERDICTS.get(letter.strip("[]")) if isinstance(letter, str) else None
                found = Reading(choice, found.start, at)
                quoted |= form == "json" and choice is not None
            elif _OURS.match(text, mark.start()):
                found, quoted = Reading(None, found.start, at), True
        elif not mark["token"]:
            found, quoted = Reading(start=at), False
        elif not quoted:
            found = Reading(VERDICTS[mark["token"]], found.start, at)
    return found


def _object(text: str, start: int) -> tuple[dict[str, Any], int]:
    """Return the JSON object that begins there, and its end; {} if it is none."""
    try:
        value: dict[str, Any]
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return {}, start
    return value, end


def ends_with_verdict(text: str, form: str = "") -> bool:
    """Return whether a verdict is the last thing in the text, markup aside."""
    found = read(text, form)
    return found.choice is not None and re.fullmatch(r"\W*", text[found.end :]) is not None
