"""Chats as files write them, as turns: {role, content} (OpenAI, TRL), {from, value} (ShareGPT),
text parts, and either of them as JSON text."""

from __future__ import annotations

import ast
import json
from contextlib import suppress
from typing import Any

from gipo_megatron.data.examples import BadRow, Turn

ROLES = {  # of files, ours; human and gpt are ShareGPT's
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}
CALLS = ("tool_calls", "function_call")


def parsed(value: Any) -> Any:
    """Return a chat as a list of messages: also one that a text spells out as JSON or Python, and a
    message alone. Any other value is returned unchanged."""
    if isinstance(value, dict) and _is_message(value):
        return [value]
    if isinstance(value, str) and value.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                chat = parse(value.strip())
                if chat and all(map(_is_message, chat)):
                    return chat
    return value


def _is_message(value: Any) -> bool:
    """Check for a role of a chat, so that a reply in JSON stays text."""
    return isinstance(value, dict) and str(_first(value, "role", "from")).lower() in ROLES


def turns_of(value: Any) -> tuple[Turn, ...]:
    """Raises BadRow."""
    if not isinstance(value, list) or not value:
        raise BadRow("not a list of messages")
    return tuple(_turn(message) for message in value)


def reply_of(turn: Turn) -> str:
    """Raises BadRow."""
    if turn.role != "assistant":
        raise BadRow("the last turn is not the assistant's")
    return turn.text


def answered(prompt: tuple[Turn, ...], chat: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], str]:
    """Return (prompt, reply) of a prompt beside a chat: the assistant's turn alone, or the whole
    chat, which begins with the prompt. Raises BadRow."""
    if len(chat) == 1:
        return prompt, reply_of(chat[0])
    (own, asked), (system, body) = _without_system(prompt), _without_system(chat)
    if body[:1] and body[0].role == "assistant":
        raise BadRow("a response of more than one turn")
    both = own and system and _words(own) != _words(system)
    if both or _words(body[: len(asked)]) != _words(asked):
        raise BadRow("a chat that does not begin with the prompt beside it")
    return (*(system or own), *body[:-1]), reply_of(body[-1])


def _without_system(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    start = int(turns[0].role == "system")
    return turns[:start], turns[start:]


def _words(turns: tuple[Turn, ...]) -> list[tuple[str, str]]:
    return [(turn.role, turn.text.strip()) for turn in turns]


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict):
        raise BadRow("a message without text content")
    if any(message.get(name) for name in CALLS):
        raise BadRow("a message that calls a tool, which has no text to learn")
    role, content = _first(message, "role", "from"), _first(message, "content", "value")
    if str(role).lower() not in ROLES:
        raise BadRow(f"the role {str(role)[:20]!r} is none of {', '.join(ROLES)}")
    return Turn(ROLES[str(role).lower()], _text(content))


def _first(message: dict[str, Any], *names: str) -> Any:
    return next((message[name] for name in names if message.get(name) is not None), None)


def _text(content: Any) -> str:
    """Return the text of a message; parts of text are joined by newlines. Raises BadRow."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise BadRow("a message without text content")
    texts = []
    for part in content:
        shape = part if isinstance(part, dict) else {"text": part}
        kind, text = str(shape.get("type") or "text"), shape.get("text")
        if not kind.endswith("text") or not isinstance(text, str):  # text, input_text, …
            raise BadRow(f"a part of a message that is no text (type {kind[:20]!r})")
        texts.append(text)
    return "\n".join(texts)
