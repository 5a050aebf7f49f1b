"""Refusals of a chat server: what they concern, and the request that may be accepted instead."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

# error codes and types of a 429 that no wait ends
QUOTA = re.compile(r"quota|billing|credit|balance|payment")
# error codes, or words where a server gives no code, of a refusal of one text: forbidden, too long
TEXT = re.compile(
    r"content_filter|content.policy|content management policy"
    r"|(context|prompt|input|sequence|message).(length|window|size|limit)"
    r"|too long|longer than|too many tokens|token count|`inputs` tokens",
    re.IGNORECASE,
)

# changes of a request that a server refuses: words in its error message -> the change
NO_SYSTEM = "the system text in front of the user's text"
COMPLETION_TOKENS = "max_completion_tokens instead of max_tokens"
NO_TEMPERATURE = "no temperature"
NO_LENGTH = "no maxLength in the schema"
NO_FORMAT = "no response_format"
CHANGES = {
    COMPLETION_TOKENS: re.compile(r"\bmax_tokens\b"),
    NO_TEMPERATURE: re.compile(r"\btemperature\b"),
    NO_SYSTEM: re.compile(
        r"\broles?\b|(system|developer) (role|message|prompt|instruction)|chat.?template|jinja"
        r"|template.?error",
        re.IGNORECASE,
    ),
    NO_LENGTH: re.compile(r"\bmaxLength\b"),
    NO_FORMAT: re.compile(
        r"response.?format|schema|json.?(mode|object|validat)|generat\w* json|structured|grammar"
        r"|guided|output_(config|format)",
        re.IGNORECASE,
    ),
}
# headers with a wait, and their units in seconds
WAITS = {"retry-after-ms": 1e-3, "x-ms-retry-after-ms": 1e-3, "retry-after": 1.0}


def changed(request: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return the request with these CHANGES, as far as they concern it."""
    sent = dict(request)
    if COMPLETION_TOKENS in changes and "max_tokens" in sent:
        sent["max_completion_tokens"] = sent.pop("max_tokens")
    if NO_TEMPERATURE in changes:
        sent.pop("temperature", None)
    if NO_LENGTH in changes:
        sent = _without("maxLength", sent)
    if NO_FORMAT in changes:
        sent.pop("response_format", None)
    if NO_SYSTEM in changes:
        text = "\n\n".join(message["content"] for message in sent["messages"])
        sent["messages"] = [{"role": "user", "content": text}]
    return sent


def _without(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without(name, inner) for key, inner in value.items() if key != name}


def change_for(words: str, sent: dict[str, Any]) -> str:
    """Return the change of a sent request that an error message calls for; "" for none."""
    found = (name for name, called in CHANGES.items() if called.search(words))
    return next((name for name in found if changed(sent, [name]) != sent), "")


def error_object(body: Any) -> dict[str, Any]:
    """Return the error object of a body (some servers put it into a list); {} without one."""
    found = body[0] if isinstance(body, list) and body else body
    found = found.get("error", found) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) else {"message": str(found)}


def seconds_to_wait(headers: Mapping[str, str]) -> float:
    """Return the first wait that the headers hold; 0 without one."""
    waits = (_seconds(headers.get(name, ""), unit) for name, unit in WAITS.items())
    return next((wait for wait in waits if wait), 0.0)


def _seconds(value: str, unit: float) -> float:
    """Return seconds from a number or a date; 0 for anything else, and for the past."""
    try:
        seconds = float(value) * unit
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else max(0.0, seconds)
