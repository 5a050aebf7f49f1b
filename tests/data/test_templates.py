from __future__ import annotations

import pytest

from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.encoding import Encoder
from gipo_megatron.data.examples import BadRow, Example, Turn
from gipo_megatron.data.templates import CHATML, as_chat_template, choose, messages
from gipo_megatron.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from tests.data.fixtures import SHARED, needs_shared_data
from tests.data.test_tokenizer import small_tokenizer

CONVERSATION = (
    Turn("system", "be brief"),
    Turn("user", "one"),
    Turn("assistant", "two"),
    Turn("user", "three"),
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{"
    " raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}[{{"
    " m['content'] }}]{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
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
        (
            "auto",
            "transcript",
            (Turn("user", "  q"), Turn("assistant", "a")),
            "  r",
            "\n\nHuman:  q\n\nAssistant:a\n\nAssistant:|  r",
        ),
        (
            "auto",
            "messages",
            CONVERSATION[:3],
            "A",
            "be brief\n\nHuman: one\n\nAssistant: two\n\nAssistant:| A",
        ),
        (
            "chatml",
            "text",
            (Turn("text", "Q"),),
            " A ",
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n|A<|im_end|>\n",
        ),
        (STRICT, "transcript", (Turn("user", " q"), Turn("user", " r")), " s", "[q\n\nr]|s<eos>"),
    ],
)
def test_texts_by_hand(
    spec: str, style: str, turns: tuple[Turn, ...], reply: str, expected: str
) -> None:
    assert whole(spec, style, turns, reply) == expected


def test_messages_alternate() -> None:
    turns = (
        Turn("text", "Rules."),
        Turn("user", " a "),
        Turn("assistant", " "),
        Turn("user", "b"),
        Turn("assistant", "c"),
    )
    assert messages(turns) == [
        {"role": "user", "content": "Rules.\n\na\n\nb"},
        {"role": "assistant", "content": "c"},
    ]


def test_a_template_that_refuses_is_a_bad_row() -> None:
    template = choose(STRICT, "messages", byte_tokenizer())
    with pytest.raises(BadRow, match="roles must alternate"):
        template.prompt((Turn("assistant", "first"), Turn("user", "second")))


def test_a_template_that_rewrites_the_prompt_is_a_bad_row() -> None:
    template = choose(
        "{{ messages | length }}{{ messages[-1]['content'] }}", "messages", byte_tokenizer()
    )
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


CONVERSATIONS = [
    CONVERSATION,
    (Turn("user", "one"),),
    (
        Turn("user", "Grüße,  日本語\n\nand more"),
        Turn("assistant", "-"),
        Turn("user", "a {{ b }} {% c %}"),
    ),
    (
        Turn("user", "1"),
        Turn("assistant", "two\nlines"),
        Turn("user", "3"),
        Turn("assistant", "four"),
        Turn("user", "5?"),
    ),
]


def check_ids(spec: str, tokenizer: Tokenizer, whole: bool) -> None:
    """apply_chat_template of a tokenizer that carries the text = the Encoder's prompt; `whole`: and
    its prompt + response + eos."""
    encoder = Encoder(DataConfig(max_length=4096, max_response=512, template=spec), tokenizer)
    carrier = tokenizer.with_chat_template(as_chat_template(spec, tokenizer)).inner
    for turns in CONVERSATIONS:
        example = Example("messages", turns, ("a reply",), "s", {})
        sent = [{"role": turn.role, "content": turn.text} for turn in turns]
        ids = carrier.apply_chat_template(
            sent, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        assert ids == encoder.prompt(example, 0)[0], (spec, turns)
        finished = [*sent, {"role": "assistant", "content": "a reply"}]
        ids = carrier.apply_chat_template(finished, tokenize=True, return_dict=True)["input_ids"]
        trained = encoder.sequence(example, 0, 0).tokens
        assert ids == (trained if whole else trained[:-1]), (spec, turns)
    assert len(CONVERSATIONS) == 4


OWN = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + eos_token }}{% endfor"
    " %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("spec", "whole"),
    # chatml ends a turn with text of its own; training adds eos to it
    [("hh", True), ("auto", True), ("chatml", False), (OWN, True)],
)
@pytest.mark.parametrize("kind", ["bytes", "each", "first"])
def test_a_chat_template_gives_the_ids_of_training(kind: str, spec: str, whole: bool) -> None:
    check_ids(spec, byte_tokenizer() if kind == "bytes" else small_tokenizer(kind), whole)


def test_a_tokenizer_that_puts_a_space_before_the_first_text_alone() -> None:
    """By hand: Metaspace "first" cuts "A" as "▁A" and "<s>A" as "A", so the template has to write
    that space."""
    each, first = small_tokenizer("each"), small_tokenizer("first")
    openings = [
        str(as_chat_template("hh", tokenizer)).split("{% for")[0]
        for tokenizer in (byte_tokenizer(), each, first)
    ]
    assert openings == ["{{ bos_token }}", "{{ bos_token }}", "{{ bos_token + ' ' }}"]
    assert (
        first.encode("A")
        == each.encode("<s>A", markup=True)[1:]
        == first.encode("<s> A", markup=True)[1:]
    )
    assert first.encode("<s>A", markup=True)[1:] == first.encode("A")[1:]


def test_the_tokenizers_own_template_stays() -> None:
    tokenizer = byte_tokenizer().with_chat_template(OWN)
    check_ids("auto", tokenizer, whole=True)
    check_ids("chat", tokenizer, whole=True)
    assert as_chat_template("auto", tokenizer) == as_chat_template("chat", tokenizer) == OWN
    assert as_chat_template("auto", tokenizer, style="transcript") == as_chat_template(
        "hh", tokenizer
    )


@needs_shared_data
@pytest.mark.parametrize(("spec", "whole"), [("hh", True), ("chatml", False), (OWN, True)])
@pytest.mark.parametrize("name", ["mistral_v1", "hh_bytebpe_4k"])
def test_the_ids_of_training_with_the_real_tokenizers(name: str, spec: str, whole: bool) -> None:
    check_ids(spec, load_tokenizer(str(SHARED / "tokenizers" / name)), whole)


def test_chat_templates_by_hand() -> None:
    tokenizer = byte_tokenizer()
    assert as_chat_template("plain", tokenizer) is None
    assert as_chat_template("auto", tokenizer, style="text") is None
    assert (
        as_chat_template("chatml", tokenizer) == CHATML
        and as_chat_template(STRICT, tokenizer) == STRICT
    )
    jinja = as_chat_template("hh", tokenizer)
    assert jinja is not None
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert tokenizer.render([user], jinja, True) == "<bos>\n\nHuman: q\n\nAssistant:"
    assert (
        tokenizer.render([user, assistant], jinja, False)
        == "<bos>\n\nHuman: q\n\nAssistant: a<eos>"
    )
    assert (
        tokenizer.render([user, assistant, user], jinja, True)
        == "<bos>\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant:"
    )
    with pytest.raises(UserError, match="no chat template"):
        as_chat_template("chat", tokenizer)
