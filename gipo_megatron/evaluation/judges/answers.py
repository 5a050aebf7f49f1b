"""An answer from a chat completion: its text without the model's thoughts, and its faults.

No reply raises an error: it was paid for, and what has no verdict is counted as such.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gipo_megatron.evaluation.chat_bodies import text_of
from gipo_megatron.evaluation.judges import verdicts
from gipo_megatron.web import at

# finish_reason of an answer that ended by itself, and of one that reached its longest length;
# after any other one a verdict counts at the very end only
ENDED, CUT = ("", "stop"), ("length", "max_tokens", "model_length")
LONGER = "a larger judge.max_tokens may help"


@dataclass(frozen=True)
class Answer:
    """`fault`: why a verdict in `text` must not count; "" without one. `cut`: another max_tokens
    may give a whole answer. `form`: that was requested."""

    text: str
    fault: str
    cut: bool
    prompt_tokens: int
    completion_tokens: int

    form: str = ""

    @property
    def choice(self) -> str | None:
        """Return FIRST, SECOND or TIE; None without a verdict that counts."""
        return None if self.fault else verdicts.read(self.text, self.form).choice


def read_answer(body: dict[str, Any], form: str = "") -> Answer:
    """Return the answer of a chat completion, or of {"refused": reason}, to a request for `form`
    (text | json)."""
    message = at(body, "choices", 0, "message")
    finish = str(at(body, "choices", 0, "finish_reason") or "").lower()
    whole = text_of(at(message, "content"))
    thought = text_of(at(message, "reasoning_content") or at(message, "reasoning"))
    if not whole.strip() and verdicts.ends_with_verdict(thought, form):
        whole = thought  # a server's parser took an answer without thoughts for one
    reading = verdicts.read(whole, form)
    text = whole[reading.start :].strip()
    refusal, tokens = text_of(at(message, "refusal")), at(body, "usage")
    cut, fault = False, ""
    if "refused" in body:
        cut, fault, text = True, "refused", str(body["refused"])
    elif finish in CUT:
        cut, fault = True, f"cut at max_tokens; {LONGER}"
    elif verdicts.OPENED.match(text) or (thought and not whole.strip()):
        cut, fault = True, f"only thoughts; {LONGER}"
    elif refusal:
        fault, text = "the model refused", refusal
    elif not reading.choice or not (finish in ENDED or verdicts.ends_with_verdict(text, form)):
        fault = f"no verdict; finish_reason {finish or 'not given'}"
    return Answer(
        text or thought or json.dumps(message),
        fault,
        cut,
        _count(at(tokens, "prompt_tokens")),
        _count(at(tokens, "completion_tokens")),
        form,
    )


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**31 else 0
