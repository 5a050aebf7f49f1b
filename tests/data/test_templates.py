from __future__ import annotations

import pytest

from gipo_megatron.data.examples import BadRow, Turn
from gipo_megatron.data.templates import choose, messages
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.errors import UserError

CONVERSATION = (Turn("system", "be brief"), Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"))
STRICT = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def whole(spec: str, style: str, turns: tuple[Turn, ...], reply: str) -> str:
    template = choose(spec, style, byte_tokenizer())
    prompt = template.prompt(turns)
    return prompt + "|" + template.response(prompt, turns, reply)


@pytest.mark.parametrize(
    ("spec", "style", "turns", "reply", "expected"),
    [
        ("auto", "text", (Turn("text", "Q:"),), "A", "Q:|A"),
        ("hh", "text", (Turn("text", "Q"),), "A", "\n\nHuman: Q\n\nAssistant:| A"),
        ("auto", "transcript", (Turn("user", "  q"), Turn("assistant", "a")), "  r", "\n\nHuman:  q\n\nAssistant:a\n\nAssistant:|  r"),
        ("auto", "messages", CONVERSATION[:3], "A", "be brief\n\nHuman: one\n\nAssistant: two\n\nAssistant:| A"),
        ("chatml", "text", (Turn("text", "Q"),), " A ", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n|A<|im_end|>\n"),
        (STRICT, "transcript", (Turn("user", " q"), Turn("user", " r")), " s", "[q\n\nr]|s<eos>"),
    ],
)
def test_texts_by_hand(spec: str, style: str, turns: tuple[Turn, ...], reply: str, expected: str) -> None:
    assert whole(spec, style, turns, reply) == expected


def test_messages_alternate() -> None:
    turns = (Turn("text", "Rules."), Turn("user", " a "), Turn("assistant", " "), Turn("user", "b"), Turn("assistant", "c"))
    assert messages(turns) == [{"role": "user", "content": "Rules.\n\na\n\nb"}, {"role": "assistant", "content": "c"}]


def test_a_template_that_refuses_is_a_bad_row() -> None:
    template = choose(STRICT, "messages", byte_tokenizer())
    with pytest.raises(BadRow, match="roles must alternate"):
        template.prompt((Turn("assistant", "first"), Turn("user", "second")))


def test_a_template_that_rewrites_the_prompt_is_a_bad_row() -> None:
    template = choose("{{ messages | length }}{{ messages[-1]['content'] }}", "messages", byte_tokenizer())
    prompt = template.prompt((Turn("user", "x"),))
    with pytest.raises(BadRow, match="otherwise than an opened one"):
        template.response(prompt, (Turn("user", "x"),), "y")


@pytest.mark.parametrize(
    ("spec", "style", "said"),
    [("chat", "text", "no chat template"), ("lama", "text", "unknown template 'lama'")],
)
def test_templates_that_are_not_there(spec: str, style: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose(spec, style, byte_tokenizer())


def test_plain_is_no_template_for_a_conversation() -> None:
    with pytest.raises(UserError, match="not conversations"):
        choose("plain", "messages", byte_tokenizer()).prompt(CONVERSATION)


def test_broken_jinja() -> None:
    with pytest.raises(UserError, match="not valid jinja"):
        choose("{% for m in messages %}", "messages", byte_tokenizer()).prompt(CONVERSATION)


def test_chat_is_the_tokenizers_own() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = STRICT
    assert choose("auto", "messages", tokenizer).prompt((Turn("user", "x"),)) == "[x]"
    assert choose("chat", "transcript", tokenizer).prompt((Turn("user", " x"),)) == "[x]"
