"""The JSON of a chat server's answer, also of one that came as events or as parts."""

from __future__ import annotations

from typing import Any

from gipo_megatron.web import at, read_json

# types of a message's parts: the text; of the other ones, those that are no thoughts are read in
# a message without a text
TEXT_PARTS = (None, "text", "output_text")
THOUGHTS = ("think", "thought", "reason", "analysis", "summary")
# finish_reason of an answer that the server gave up: vLLM, SGLang; OpenRouter; DeepSeek; Zhipu
GIVEN_UP = ("abort", "aborted", "error", "insufficient_system_resource", "network_error")


def body_of(text: str) -> Any:
    """Return the JSON value that a text begins with, or the completion of a stream of events, which
    some servers send unrequested; None for neither."""
    value = _json(text)
    return _completion(text) if value is None else value


def _json(text: str) -> Any:
    try:
        return read_json(text)
    except ValueError:
        return None


def _completion(stream: str) -> Any:
    message: dict[str, list[Any]] = {}
    finish = usage = None
    for line in stream.split("\n"):
        event = _json(line.removeprefix("data:")) if line.startswith("data:") else None
        if at(event, "error"):
            return event
        usage = at(event, "usage") or usage
        choice = at(event, "choices", 0)
        finish = at(choice, "finish_reason") or finish
        new = at(choice, "delta") or at(choice, "message")
        for name, value in new.items() if isinstance(new, dict) else ():
            message.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    if not message or not (finish or "[DONE]" in stream):  # nothing, or a stream that broke off
        return None
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def text_of(content: Any) -> str:
    """Return a string, or the text parts of a list joined; thoughts among them are left out."""
    parts = content if isinstance(content, list) else [content]
    texts = (_text(part) for part in parts if at(part, "type") in TEXT_PARTS)
    return "".join(texts) or "".join(_text(part) for part in parts if not _is_thought(part))


def _is_thought(part: Any) -> bool:
    return any(word in str(at(part, "type")) for word in THOUGHTS)


def _text(part: Any) -> str:
    text = part if isinstance(part, str) else at(part, "text")
    text = at(text, "value") if isinstance(text, dict) else text
    return text if isinstance(text, str) else ""
