"""The last verdict of a text counts, in either form; what an explanation quotes is none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gipo_megatron.evaluation.judges.verdicts import ends_with_verdict, read
from gipo_megatron.evaluation.types import FIRST, SECOND, TIE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A is right.\n[[A]]", FIRST),
        ("[[B]]", SECOND),
        ("[[C]]\n", TIE),
        ("Answer A says '[[B]]' to sway me. I choose [[A]].", FIRST),
        ("[[A]] [[B]] [[C]]", TIE),
        ("[[A]]\nOn reflection: [[B]] (not A)", SECOND),
        ("[A] [[ A ]] [[a]] [[AB]] [[rating]] A", None),
        ("", None),
        ("<think>[[B]]</think>[[A]]", FIRST),
        ("[[B]]</think>No verdict.", None),
        # JSON
        ('{"explanation": "A is fuller.", "verdict": "A"}', FIRST),
        ('{"verdict": "B", "explanation": "It quotes [[A]]."}', SECOND),
        ('```json\n{\n  "explanation": "x",\n  "verdict": "C"\n}\n```', TIE),
        ('Here it is:\n{"explanation": "a line\nbreak", "verdict": "B"} I hope it helps.', SECOND),
        ('[{"reasoning": "x", "verdict": "B"}]', SECOND),
        ('{"explanation": "x", "verdict": "[[A]]"}', FIRST),
        ('{"explanation": "x", "verdict": "A"} No: {"explanation": "y", "verdict": "B"}', SECOND),
        ('{"explanation": "x", "verdict": "A", "verdict": "B"}', SECOND),
        ('I owe {"explanation": …, "verdict": …}.\n{"explanation": "x", "verdict": "B"}', SECOND),
        ('<think>{"explanation": "so", "verdict": "B"} or {"expl</think>[[A]]', FIRST),
        ('{"explanation": "It shows </think>.", "verdict": "A"}', FIRST),
        ('Its JSON is {"a": {"b": "[[B]]"}}, and broken: {"c": 1.\n[[A]]', FIRST),
        ('It returns {"verdict": "guilty"}.\n[[B]]', SECOND),
        # another schema, cut, no JSON
        ('{"explanation": "x", "verdict": "D"}', None),
        ('{"explanation": "x", "verdict": "a"}', None),
        ('{"explanation": "x", "verdict": null}', None),
        ('{"explanation": "x", "verdict": ["A"]}', None),
        ('{"explanation": "x", "verdict": {"A": "A"}}', None),
        ('[[A]] {"explanation": "x", "verdict": "D"}', None),
        ('{"explanation": "x", "winner": "A"}', None),
        ('{"explanation": "Answer B says [[B]] and ', None),
        ('{"explanation": "He says "hi" and [[B]]", "verdict": "A"}', None),
        ('{"verdict": "A', None),
        ('{"type": "object", "properties": {"verdict": {"enum": ["A", "B", "C"]}}}', None),
        ('{"a":' * 5000, None),
        ('{"verdict": ' + "9" * 5000 + "}", None),
        ('{"' * 200_000 + "[[A]]", FIRST),  # a model that repeats itself
    ],
)
def test_the_last_verdict_counts(text: str, expected: str | None) -> None:
    assert read(text).choice == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"explanation": "x", "verdict": "A"}\nAnswer B ends with [[B]] to sway me.', FIRST),
        ('{"explanation": "x", "verdict": "A"} No: {"explanation": "y", "verdict": "B"}', SECOND),
        ('{"explanation": "x", "verdict": "A"}</think>[[B]]', SECOND),
        ('It returns {"verdict": "guilty"}.\n[[B]]', SECOND),
        ("[[A]] or rather [[B]]", SECOND),  # a server that leaves the form out
    ],
)
def test_words_after_a_requested_object_may_quote_a_verdict(text: str, expected: str) -> None:
    assert read(text, "json").choice == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So:\n**[[A]]**", True),
        ('```\n{"explanation": "x", "verdict": "A"}\n```', True),
        ("[[A]] it is", False),
        ('{"explanation": "x", "verdict": "D"}', False),
        ("A", False),
    ],
)
def test_whether_the_verdict_is_the_end(text: str, expected: bool) -> None:
    assert ends_with_verdict(text) == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.text(max_size=30) | st.just("[[B]] </think> {"),
    st.sampled_from("ABC"),
    st.booleans(),
    st.sampled_from(["{}", "```json\n{}\n```", "<think>[[B]] {{</think>{}", "  {}\n"]),
)
def test_every_object_of_the_schema_has_its_verdict(
    explanation: str, letter: str, ascii_only: bool, around: str
) -> None:
    answer = {"explanation": explanation, "verdict": letter}
    text = around.format(json.dumps(answer, ensure_ascii=ascii_only))
    assert read(text).choice == {"A": FIRST, "B": SECOND, "C": TIE}[letter]
    assert ends_with_verdict(text)
