"""No reply of a server breaks the reader: what was paid for is an answer, or counted as none."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gipo_megatron.evaluation.judges.answers import read_answer
from gipo_megatron.evaluation.types import FIRST, SECOND, TIE

KEYS = [
    "choices", "message", "content", "finish_reason", "usage", "prompt_tokens",
    "completion_tokens", "reasoning", "reasoning_content", "refusal", "type", "text",
]  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
ANY = st.recursive(
    LEAVES | st.just("[[A]]"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    ANY
    | st.builds(lambda message, use: {"choices": [{"message": message}], "usage": use}, ANY, ANY)
)
def test_any_json_is_read(body: Any) -> None:
    answer = read_answer(body if isinstance(body, dict) else {"choices": body})
    assert isinstance(answer.text, str) and isinstance(answer.prompt_tokens, int)
    assert answer.choice in (FIRST, SECOND, TIE, None)
    assert (answer.choice is None) == bool(answer.fault)


WORDS = st.text(st.characters(exclude_characters="[]<>", exclude_categories=["Cs"]), max_size=20)
VERDICT = st.sampled_from(["[[A]]", "[[B]]", "[[C]]"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(WORDS, VERDICT, WORDS, VERDICT, st.sampled_from(["tag", "part", "field", "none"]))
def test_the_verdict_is_of_the_text_and_not_of_the_thought(
    thought: str, maybe: str, text: str, last: str, form: str
) -> None:
    thought, text = f"{thought} {maybe}", f"{text}\n{last}"
    parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": text}]
    message = {
        "tag": {"content": f"<think>{thought}</think>{text}"},
        "part": {"content": parts},
        "field": {"content": text, "reasoning_content": thought},
        "none": {"content": text},
    }[form]
    answer = read_answer({"choices": [{"message": message, "finish_reason": "stop"}]})
    assert answer.choice == {"A": FIRST, "B": SECOND, "C": TIE}[last[2]]
    assert answer.text == text.strip()
