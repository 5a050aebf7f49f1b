"""An answer from a chat completion: its text without the model's thoughts, and its faults.

No reply raises an error: it was paid for, and what has no verdict is counted as such.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gipo_megatron.evaluation.judges import prompts

# tags of thoughts: <think>, <thinking>, <seed:think>, [THINK], …
_NAME = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning)"
_OPENED = re.compile(rf"\s*[<\[]{_NAME}[>\]]", re.IGNORECASE)
_CLOSED = re.compile(rf"[<\[]/{_NAME}[>\]]", re.IGNORECASE)
TEXT_PARTS = (None, "text", "output_text")  # types of a message's parts; others are thoughts
LONGER = "a larger judge.max_tokens may help"


@dataclass(frozen=True)
class Answer:
    """`fault`: why a verdict in `text` must not count; "" without one. `cut`: another max_tokens
    may give a whole answer."""

    text: str
    fault: str
    cut: bool
    prompt_tokens: int
    completion_tokens: int

    @property
    def choice(self) -> str | None:
        """Return FIRST, SECOND or TIE; None without a verdict that counts."""
        return None if self.fault else prompts.choice(self.text)


def read_answer(body: dict[str, Any]) -> Answer:
    """Return the answer of a chat completion, or of {"refused": reason}."""
    message = _at(body, "choices", 0, "message")
    finish = str(_at(body, "choices", 0, "finish_reason") or "")
    whole = _text(_at(message, "content"))
    thought = _text(_at(message, "reasoning_content") or _at(message, "reasoning"))
    if not whole.strip() and prompts.ends_with_verdict(thought):
        whole = thought  # a server's parser took an answer without thoughts for one
    text = _CLOSED.split(whole)[-1].strip()
    refusal, tokens = _text(_at(message, "refusal")), _at(body, "usage")
    cut, fault = False, ""
    if "refused" in body:
        cut, fault, text = True, "refused", str(body["refused"])
    elif finish == "length":
        cut, fault = True, f"cut at max_tokens; {LONGER}"
    elif _OPENED.match(text) or (thought and not whole.strip()):
        cut, fault = True, f"only thoughts; {LONGER}"
    elif refusal:
        fault, text = "the model refused", refusal
    elif finish == "content_filter" or prompts.choice(text) is None:
        fault = f"no verdict; finish_reason {finish or 'not given'}"
    return Answer(
        text or thought or json.dumps(message),
        fault,
        cut,
        _count(_at(tokens, "prompt_tokens")),
        _count(_at(tokens, "completion_tokens")),
    )


def _text(content: Any) -> str:
    """Return a string, or a list's text parts joined; thoughts among them are left out."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (
        part if isinstance(part, str) else _at(part, "text")
        for part in parts
        if isinstance(part, str) or _at(part, "type") in TEXT_PARTS
    )
    return "".join(text for text in texts if isinstance(text, str))


def _at(value: Any, *path: str | int) -> Any:
    """Return the value at a path of keys and indices; None where there is none."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
