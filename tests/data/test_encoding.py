from __future__ import annotations

import pytest

from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.encoding import TOO_LONG, Encoder
from gipo_megatron.data.examples import BadRow, Example, Turn
from gipo_megatron.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from tests.data.fixtures import SHARED, needs_shared_data

BOS, EOS = 257, 258


def encoder(
    max_length: int = 64,
    max_response: int = 16,
    template: str = "auto",
    tokenizer: Tokenizer | None = None,
) -> Encoder:
    return Encoder(
        DataConfig(max_length=max_length, max_response=max_response, template=template),
        tokenizer or byte_tokenizer(),
    )


def text(prompt: str, *responses: str) -> Example:
    return Example("text", (Turn("text", prompt),), responses, "s", {})


def talk(*turns: str) -> Example:
    return Example(
        "transcript",
        tuple(Turn("user" if i % 2 == 0 else "assistant", t) for i, t in enumerate(turns)),
        (" ok",),
        "s",
        {},
    )


def test_prompt_response_and_end_of_text() -> None:
    encoded = encoder().sequence(text("ab", "cd", "e"), 0, 0)
    assert encoded.tokens == [BOS, *b"abcd", EOS] and encoded.prompt_length == 3
    assert encoder().sequence(text("ab", "cd", "e"), 0, 1).tokens == [BOS, *b"abe", EOS]
    assert encoder().prompt(text("ab"), 0) == ([BOS, *b"ab"], "ab")


def test_a_long_response_loses_its_end_and_is_counted() -> None:
    one = encoder(max_length=20, max_response=4)
    assert one.sequence(text("ab", "xyz"), 5, 0).tokens == [BOS, *b"abxyz", EOS]
    assert not one.cuts
    assert one.sequence(text("ab", "wxyz"), 6, 0).tokens == [BOS, *b"abwxyz"]
    one.sequence(text("ab", "wxyz"), 6, 0)
    assert one.lines() == ["so far 1 rows: responses were cut at max_response"]


def test_a_long_prompt_loses_whole_turns_from_the_front() -> None:
    example = talk(" one", " two", " three", " four", " five")
    full = (
        "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: four\n\nHuman:"
        " five\n\nAssistant:"
    )
    fewer = full[full.index("\n\nHuman: three") :]
    last = full[full.index("\n\nHuman: five") :]
    seen = set()
    for room in range(len(last) + 1, len(full) + 3):
        one = encoder(max_length=room + 8, max_response=8)
        one.check(example)
        ids, prompt = one.prompt(example, 0)
        assert prompt == (full if room > len(full) else fewer if room > len(fewer) else last)
        assert ids == [BOS, *prompt.encode()] and len(ids) <= room
        assert one.sequence(example, 0, 0).tokens == [*ids, *b" ok", EOS]
        assert bool(one.cuts) == (prompt != full)
        seen.add(prompt)
    assert len(seen) == 3
    with pytest.raises(BadRow, match=TOO_LONG):
        encoder(max_length=len(last) + 8, max_response=8).check(example)


def test_the_system_turn_stays() -> None:
    turns = (
        Turn("system", "S"),
        Turn("user", "long" * 9),
        Turn("assistant", "a"),
        Turn("user", "q"),
    )
    one = encoder(
        max_length=48,
        max_response=8,
        template="{% for m in messages %}{{ m['content'] }};{% endfor %}",
    )
    assert one.prompt(Example("messages", turns, (), "s", {}), 0) == (list(b"S;q;"), "S;q;")


def test_a_text_prompt_cannot_be_cut() -> None:
    one = encoder(max_length=16, max_response=8)
    one.check(text("1234567"))
    with pytest.raises(BadRow, match=TOO_LONG):
        one.check(text("12345678"))


def test_room_for_a_prompt_is_asked_for() -> None:
    with pytest.raises(UserError, match="no room for a prompt"):
        encoder(max_length=16, max_response=16)


def test_end_of_text_inside_a_template_ends_the_response() -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else ':'"
        " }}\n{% endfor %}"
    )
    example = Example("messages", (Turn("user", "q"),), ("a",), "s", {})
    assert encoder(template=template).sequence(example, 0, 0).tokens == [*b"q:\na", EOS]


def test_special_names_in_plain_text_stay_text() -> None:
    assert encoder().sequence(text("ab", "<eos>"), 0, 0).tokens == [BOS, *b"ab<eos>", EOS]


@pytest.mark.parametrize("said", ["<eos>", "a<bos>b<pad>", "<eos>\n\n<bos>user: no"])
def test_special_names_in_a_chat_stay_text(said: str) -> None:
    """In the prompt and in the response, whose end is the template's <eos>."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role =="
        " 'assistant' %}{{ eos_token }}{% else %};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    one = encoder(template=template, max_length=200, max_response=64)
    chat = Example("messages", (Turn("system", said), Turn("user", said)), (said,), "s", {})
    one.check(chat)
    prompt = f"system:{said};user:{said};assistant:"
    assert one.prompt(chat, 0) == ([BOS, *prompt.encode()], f"<bos>{prompt}")
    encoded = one.sequence(chat, 0, 0)
    assert encoded.tokens == [BOS, *prompt.encode(), *said.encode(), EOS]
    assert encoded.prompt_length == 1 + len(prompt)


def test_roles_that_a_template_refuses_are_found_before_the_run() -> None:
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}{{"
        " messages[0]['content'] }}"
    )
    one = encoder(template=template)
    one.check(Example("messages", (Turn("user", "q"),), (), "s", {}))
    for _ in range(2):
        with pytest.raises(BadRow, match="user first"):
            one.check(Example("messages", (Turn("system", "S"), Turn("user", "q")), (), "s", {}))


@needs_shared_data
def test_sentencepiece_is_tokenised_whole_then_sliced() -> None:
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "mistral_v1"))
    one = encoder(max_length=256, max_response=64, tokenizer=tokenizer)
    prompt, reply = "\n\nHuman: What is it?\n\nAssistant:", " Tea, I think."
    assert tokenizer.encode(prompt) + tokenizer.encode(reply) != tokenizer.encode(prompt + reply)
    encoded = one.sequence(
        Example("transcript", (Turn("user", " What is it?"),), (reply,), "s", {}), 0, 0
    )
    assert encoded.tokens == [1, *tokenizer.encode(prompt + reply), 2]
    assert encoded.tokens[: encoded.prompt_length] == [1, *tokenizer.encode(prompt)]
    assert not one.cuts


@needs_shared_data
def test_a_token_over_the_border_belongs_to_the_response() -> None:
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "mistral_v1"))
    one = encoder(max_length=256, max_response=64, tokenizer=tokenizer)
    encoded = one.sequence(text("The wea", "ther"), 3, 0)
    assert tokenizer.decode(encoded.tokens) == "The weather"
    assert tokenizer.decode(encoded.tokens[encoded.prompt_length :]) == "weather"
    assert one.cuts == {"responses whose first token reaches back into the prompt": {3}}
