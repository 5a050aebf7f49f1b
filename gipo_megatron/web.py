"""Addresses of servers, and values in the JSON of their answers: for every client."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit


def is_address(url: str) -> bool:
    """Check for http(s)://HOST, with or without a port."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets of no address, or a port that is no number
        return False


def at(value: Any, *path: str | int) -> Any:
    """Return the value at a path of keys and indices; None where there is none."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value
