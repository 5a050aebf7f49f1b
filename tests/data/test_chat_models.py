"""Tokenizers and chat templates as models of other makers bring them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.encoding import Encoder
from gipo_megatron.data.examples import BadRow, Example, Turn
from gipo_megatron.data.templates import CHATML, choose
from gipo_megatron.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from tests.data.test_tokenizer import small_tokenizer

MARKS = ("<|im_start|>", "<|im_end|>")
TOOLS = CHATML + "{{ tools }}"
PAD, BOS, EOS = 256, 257, 258
THINKING = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
WORDS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def configure(folder: Path, **changes: Any) -> Path:
    """A saved tokenizer's folder with other values in tokenizer_config.json; ABSENT removes."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "ABSENT"}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_tokenizer().save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def row(*turns: tuple[str, str], reply: str = "") -> Example:
    prompt = tuple(Turn(role, text) for role, text in turns)
    return Example("messages", prompt, (reply,) if reply else (), "s", {})


def encoder(template: str, tokenizer: Tokenizer | None = None, length: int = 128) -> Encoder:
    config = DataConfig(max_length=length, max_response=32, template=template)
    return Encoder(config, tokenizer or byte_tokenizer())


# -------------------------------------------------------------------------------- which template


def as_list(folder: Path) -> None:
    named = [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": CHATML}]
    configure(folder, chat_template=named)


def as_files(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)


def as_one_file(folder: Path) -> None:
    configure(folder, chat_template=WORDS)  # an older one: the file wins in transformers
    (folder / "chat_template.jinja").write_text(CHATML)


@pytest.mark.parametrize("write", [as_list, as_files, as_one_file])
def test_the_default_template_is_used_and_saved(write: Any, folder: Path, tmp_path: Path) -> None:
    write(folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template == CHATML
    assert choose("auto", "messages", tokenizer).name == "chat"
    tokenizer.save(tmp_path / "saved")
    chat = [{"role": "user", "content": "x"}]
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nx<|im_end|>\n"
    assert not (tmp_path / "saved" / "additional_chat_templates").exists()


def test_named_templates_without_a_default(folder: Path) -> None:
    named = [{"name": "a", "template": CHATML}, {"name": "b", "template": TOOLS}]
    with pytest.raises(UserError, match="called default; found: a, b") as raised:
        load_tokenizer(str(configure(folder, chat_template=named)), "model.tokenizer")
    assert raised.value.where == "model.tokenizer"


# ---------------------------------------------------------------------- what a template refuses


def test_answers_that_do_not_follow_a_thinking_prefix_are_dropped_at_loading() -> None:
    one = encoder(THINKING)
    thought = row(("user", "q"), reply="<think>\nwell</think>yes")
    one.check(thought)
    with pytest.raises(BadRow, match=r"begins with '<\|im_start\|>assistant\\n<think>\\n'"):
        one.check(row(("user", "q"), reply="yes"))
    one.check(thought)
    tokens = one.sequence(thought, 0, 0)
    assert bytes(tokens.tokens[tokens.prompt_length : -1]) == b"well</think>yes<|im_end|>\n"


def test_a_template_may_refuse_a_text_and_not_only_roles() -> None:
    picky = (
        "{% if 'x' in messages[-1]['content'] %}{{ raise_exception('no x') }}{% endif %}" + WORDS
    )
    one = encoder(picky)
    one.check(row(("user", "a"), reply="b"))
    with pytest.raises(BadRow, match="refuses it: no x"):
        one.check(row(("user", "a"), reply="x"))
    with pytest.raises(BadRow, match="refuses it: no x"):
        one.check(row(("user", "x")))


def test_a_cut_that_the_template_refuses_is_found_at_loading() -> None:
    """Four turns fit the template, but not the room; the two turns that fit are refused."""
    template = "{% if messages | length < 3 %}{{ raise_exception('too few') }}{% endif %}" + WORDS
    turns = (("user", "long" * 20), ("assistant", "a"), ("user", "q"))
    encoder(template, length=256).check(row(*turns))
    with pytest.raises(BadRow, match="too few"):
        encoder(template, length=64).check(row(*turns))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
         + WORDS, "no system"),
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
         "leaves out the system turn"),
    ],
)  # fmt: skip
def test_the_system_turn_is_written_or_the_row_is_dropped(template: str, reason: str) -> None:
    encoder(template).check(row(("user", "q")))
    with pytest.raises(BadRow, match=reason):
        encoder(template).check(row(("system", "be brief"), ("user", "q")))


@pytest.mark.parametrize(
    "broken",
    [
        "{{ messages[0]['content'] + 1 }}",  # TypeError
        "{{ 1 // 0 }}",  # ZeroDivisionError
        "{{ messages[0].nothing.more }}",  # jinja2's own
        "{% for i in range(10 ** 9) %}{% endfor %}",  # OverflowError of the sandbox
        "{{ messages.append(1) }}",  # SecurityError
    ],
)
def test_whatever_a_template_raises_is_the_rows_reason(broken: str) -> None:
    with pytest.raises(BadRow, match="the chat template refuses it: "):
        encoder(broken).check(row(("user", "q")))


@pytest.mark.parametrize("broken", ["{% for %}", "{{ a | no_such_filter }}", "{% endif %}"])
def test_what_is_not_jinja_names_its_place(broken: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(broken)
    one = encoder("chat", load_tokenizer(str(folder)))
    with pytest.raises(UserError, match="not valid jinja: line 1") as raised:
        one.check(row(("user", "q")))
    assert str(folder) in raised.value.where


# -------------------------------------------------------------------------------- bos and ends


@pytest.mark.parametrize(("opening", "count"), [("{{ bos_token }}", 1), ("", 0)])
def test_one_bos_at_most(opening: str, count: int) -> None:
    """Only the template writes bos, as with apply_chat_template: there is no second one."""
    tokenizer = byte_tokenizer()
    assert tokenizer.begins_with_bos
    ids, _ = encoder(opening + WORDS, tokenizer).prompt(row(("user", "q")), 0)
    theirs = tokenizer.inner.apply_chat_template(
        [{"role": "user", "content": "q"}], chat_template=opening + WORDS, return_dict=False
    )
    assert ids == theirs == [BOS] * count + [ord("q")]


@pytest.mark.parametrize(
    ("closing", "end_ids", "end"),
    [
        ("<pad>\n", (PAD,), [PAD]),  # the template closes a turn with the model's other end token
        ("<pad>\n", (), [PAD, 10, EOS]),  # no end token for this model: eos ends the row, as before
        ("<eos>\n", (PAD,), [EOS]),
        ("<pad><eos>", (PAD,), [PAD]),
        ("", (PAD,), [EOS]),
    ],
)
def test_a_row_ends_where_a_response_does(
    closing: str, end_ids: tuple[int, ...], end: list[int]
) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        f"{json.dumps(closing)[1:-1]}" + "{% else %}:{% endif %}{% endfor %}"
    ).replace("\\n", "\n")
    tokenizer = byte_tokenizer().with_end_ids(end_ids)
    encoded = encoder(template, tokenizer).sequence(row(("user", "q"), reply="a"), 0, 0)
    assert encoded.tokens[encoded.prompt_length :] == [ord("a"), *end]


def test_copies_keep_the_end_tokens() -> None:
    tokenizer = byte_tokenizer().with_end_ids([PAD, EOS, PAD])
    copies = (tokenizer, tokenizer.with_chat_template(CHATML), tokenizer.with_padding("<bos>"))
    assert [copy.end_ids for copy in copies] == [(EOS, PAD)] * 3


# --------------------------------------------------------------------------- foreign tokenizers


def bad_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def other_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')


def empty_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"")


def pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0"
    )


def config_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


BROKEN: dict[str, Any] = {
    "not JSON": bad_json,
    "another JSON": other_json,
    "empty": empty_json,
    "Git LFS": pointer,
    "tokenizer.json missing": config_alone,
    "class is a number": lambda f: configure(f, tokenizer_class=3),
    "class is a list": lambda f: configure(f, tokenizer_class=[]),
    "eos is a number": lambda f: configure(f, eos_token=3),
    "eos is absent": lambda f: configure(f, eos_token="ABSENT"),
    "template is a number": lambda f: configure(f, chat_template=3),
    "templates without names": lambda f: configure(f, chat_template=[{"template": "x"}]),
    "code of its own": lambda f: configure(
        f, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}
    ),
    "special tokens": lambda f: configure(f, extra_special_tokens=3),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_cannot_be_loaded_is_one_error(name: str, folder: Path) -> None:
    BROKEN[name](folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError) as raised:
        load_tokenizer(str(folder), "model.tokenizer")
    assert raised.value.where and raised.value.fix and len(raised.value.what.splitlines()) == 1


def read_by_transformers_4(folder: Path) -> None:
    """Assert the rules of version 4.57's reader that version 5 broke: AutoTokenizer looks the class
    up by name, the base class takes extra_special_tokens for a dictionary
    (PreTrainedTokenizerBase.__init__), and gives token_type_ids unless the inputs are named."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert isinstance(config.get("extra_special_tokens", {}), dict)
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert all(isinstance(x, str) for x in config.get("additional_special_tokens", []))
    assert not isinstance(config.get("chat_template"), dict)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<pad>", "<bos>"]},
        {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<pad>"]},
        {"tokenizer_class": "ABSENT", "extra_special_tokens": {"image_token": "<pad>"}},
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "legacy": False},
        {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False},
        {"tokenizer_class": "ClassOfAnotherVersion"},
    ],
)
def test_tokenizers_of_other_versions_are_read_and_saved_for_both(
    changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    if "Llama" in changes["tokenizer_class"]:
        shutil.rmtree(folder)
        small_tokenizer("first").save(folder)
    tokenizer = load_tokenizer(str(configure(folder, **changes)))
    tokenizer.save(tmp_path / "saved")
    read_by_transformers_4(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.fingerprint == tokenizer.fingerprint
    again.save(tmp_path / "twice")
    name = "tokenizer_config.json"
    assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    special = [token.content for token in tokenizer.inner.added_tokens_decoder.values()]
    assert [again.encode(text, markup=True) for text in special] == [
        tokenizer.encode(text, markup=True) for text in special
    ]
