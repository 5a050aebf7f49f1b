"""Text from elsewhere on a screen, in a log or in a page: no control characters, no secrets."""

from __future__ import annotations

import os
import re

# C0 and C1 but for line breaks and tabs, separators of lines, overrides of the reading direction,
# and two noncharacters that no page may have
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^\s/?#@]+@")  # user:password@ of an address
SHORTEST = 8  # characters; a shorter value ("EMPTY", "none") is no secret, but a word of many texts
HIDDEN = "…"


def printable(text: str) -> str:
    r"""Replace control characters and lone surrogates by \x… and \u…; line breaks and tabs stay."""
    text = _CONTROL.sub(_escaped, text.replace("\r\n", "\n"))
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


def markdown(text: str) -> str:
    """Escape Markdown's markup, cell borders and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", one_line(text))


def code(text: str) -> str:
    """Return a text as Markdown's code, which has no markup but its end."""
    inner = one_line(text).replace("`", "'")
    return f"`{inner}`"


def _escaped(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def secrets() -> dict[str, str]:
    """Return the environment's variables whose names end in KEY, TOKEN, PASSWORD, …"""
    found = ((name, value.strip()) for name, value in os.environ.items() if _SECRET.search(name))
    return {name: value for name, value in found if len(value) >= SHORTEST}


def hide(text: str, *values: str) -> str:
    """Replace `values` of at least SHORTEST characters."""
    for value in values:
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return text


def found_in(text: str) -> str:
    """Return which secret a text contains, in words; "" for none."""
    named = [name for name, value in secrets().items() if value in text]
    if named:
        return f"the value of the environment variable {named[0]}"
    return "a password in an address" if _USER.search(text) else ""


def shown(text: str) -> str:
    """Return a text for a screen or a log: printable, without secrets of the environment and
    passwords in addresses."""
    return printable(_USER.sub(f"{HIDDEN}@", hide(text, *secrets().values())))
