"""Servers for every client: their addresses and keys, and values in the JSON of their answers."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import urlsplit

DEEPEST = 50  # lists and objects inside each other; an answer has few


def address_problem(url: str) -> str:
    """Return why `url` cannot be a recipe's address; "" for http(s)://HOST with or without a port
    and a path."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            return "is not the address of a server"
    except ValueError:  # brackets of no address, or a port that is no number
        return "is not the address of a server"
    secret = "@" in parts.netloc or parts.query or parts.fragment
    return "contains a password or a query" if secret else ""


def key_of(variable: str) -> str | None:
    """Return the key in an environment variable, "" where it is not set, None for a value that no
    header can have. A key is read where it is used, and stored in no object that is shown."""
    key = os.environ.get(variable, "").strip()
    return key if key.isascii() and (key.isprintable()) else None


def read_json(text: str) -> Any:
    """Return the JSON value that a text begins with. Raises ValueError for none, and for one that
    is nested more than DEEPEST times."""
    try:
        value = json.JSONDecoder().raw_decode(text.lstrip("\ufeff \t\r\n"))[0]
    except RecursionError as error:
        raise ValueError("nested too often") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise ValueError("nested too often")
    return value


def _parts(value: Any) -> list[Any]:
    return (
        [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    )


def at(value: Any, *path: str | int) -> Any:
    """Return the value at a path of keys and indices; None where there is none."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value
