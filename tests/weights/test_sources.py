"""check_tokenizer: what a checkpoint or a Hugging Face folder was made with, against the recipe's
tokenizer and data.template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gipo_megatron.data import tokenizer as tokenizers
from gipo_megatron.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.weights.sources import check_tokenizer
from tests.data.test_tokenizer import small_tokenizer

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
OTHER = CHAT.replace("': '", "'> '")
WHERE = "models.actor.load"


def checkpoint(folder: Path, tokenizer: Tokenizer, **said: object) -> Path:
    """As much of a checkpoint as is read before its weights."""
    tokenizer.save(folder / "tokenizer")
    meta = {
        "format": "gipo_megatron",
        "version": 1,
        "step": 1,
        "roles": {},
        "files": {},
        "tokenizer": tokenizer.fingerprint,
        **said,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def huggingface(folder: Path, tokenizer: Tokenizer | None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("template", ["auto", "hh", "plain", "chatml"])
def test_an_older_checkpoint_says_its_tokenizer_only(tmp_path: Path, template: str) -> None:
    assert (
        check_tokenizer(checkpoint(tmp_path, byte_tokenizer()), byte_tokenizer(), template, WHERE)
        == []
    )


def test_the_tokenizer_that_lies_in_a_checkpoint_is_its_own(tmp_path: Path) -> None:
    made_with = small_tokenizer("each").with_chat_template(CHAT)
    folder = checkpoint(tmp_path, made_with, chat_template=CHAT, template="chat")
    assert check_tokenizer(folder, load_tokenizer(str(folder / "tokenizer")), "chat", WHERE) == []


def test_another_tokenizer_than_a_checkpoints(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, small_tokenizer("each"))
    with pytest.raises(
        UserError,
        match="another tokenizer than this recipe's: vocabulary 354 and 259; id 0 is '<unk>'",
    ) as raised:
        check_tokenizer(folder, byte_tokenizer(), "auto", WHERE)
    assert (
        raised.value.where == WHERE
        and raised.value.fix == f"model.tokenizer={folder / 'tokenizer'}"
    )


def test_a_folder_without_a_tokenizer_passes(tmp_path: Path) -> None:
    assert check_tokenizer(huggingface(tmp_path, None), byte_tokenizer(), "auto", WHERE) == []


def test_a_huggingface_folder_with_a_tokenizer(tmp_path: Path) -> None:
    folder = huggingface(tmp_path, small_tokenizer("each").with_padding("<unk>"))
    # padding is never read
    assert check_tokenizer(folder, small_tokenizer("each"), "auto", WHERE) == []
    with pytest.raises(UserError, match="vocabulary 354 and 259") as raised:
        check_tokenizer(folder, byte_tokenizer(), "auto", WHERE)
    assert raised.value.where == WHERE and raised.value.fix == f"model.tokenizer={folder}"
    with pytest.raises(UserError, match="by other rules"):
        check_tokenizer(folder, small_tokenizer("first"), "auto", WHERE)


def test_a_broken_tokenizer_in_a_folder_is_said(tmp_path: Path) -> None:
    folder = huggingface(tmp_path, byte_tokenizer())
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        check_tokenizer(folder, byte_tokenizer(), "auto", WHERE)


def test_a_folders_tokenizer_is_read_once_and_the_recipes_own_never(tmp_path: Path) -> None:
    folder = huggingface(tmp_path, byte_tokenizer())
    reads = tokenizers._read_facts.cache_info
    before = reads()
    assert check_tokenizer(folder, load_tokenizer(str(folder)), "auto", WHERE) == []
    assert (reads().misses, reads().hits) == (before.misses, before.hits)
    for role in ("actor", "critic", "reward"):
        assert check_tokenizer(folder, byte_tokenizer(), "auto", f"models.{role}.load") == []
    assert (reads().misses, reads().hits) == (before.misses + 1, before.hits + 2)
    byte_tokenizer().with_chat_template(OTHER).save(folder)  # written anew: read anew
    with pytest.raises(UserError, match="two chat templates"):
        check_tokenizer(folder, byte_tokenizer().with_chat_template(CHAT), "chat", WHERE)


@pytest.mark.parametrize("kind", ["checkpoint", "huggingface"])
@pytest.mark.parametrize("template", ["chat", "auto"])
def test_two_chat_templates(tmp_path: Path, kind: str, template: str) -> None:
    theirs, ours = (
        byte_tokenizer().with_chat_template(OTHER),
        byte_tokenizer().with_chat_template(CHAT),
    )
    folder = (
        checkpoint(tmp_path, theirs, chat_template=OTHER)
        if kind == "checkpoint"
        else huggingface(tmp_path, theirs)
    )
    with pytest.raises(UserError, match="two chat templates") as raised:
        check_tokenizer(folder, ours, template, WHERE)
    # the place where they part
    assert "'> ' +" in raised.value.what and "': ' +" in raised.value.what
    home = folder / "tokenizer" if kind == "checkpoint" else folder
    assert raised.value.fix.startswith(f"model.tokenizer={home}, or write data.template explicitly")
    for explicit in ("hh", "chatml", CHAT):
        assert check_tokenizer(folder, ours, explicit, WHERE) == []
    # the recipe's tokenizer has none: hh
    assert check_tokenizer(folder, byte_tokenizer(), "auto", WHERE) == []
    assert check_tokenizer(folder, theirs, template, WHERE) == []


@pytest.mark.parametrize("kind", ["checkpoint", "huggingface"])
def test_one_chat_template(tmp_path: Path, kind: str) -> None:
    """A base model without one may be trained with any."""
    bare = byte_tokenizer()
    folder = (
        checkpoint(tmp_path, bare, chat_template=None)
        if kind == "checkpoint"
        else huggingface(tmp_path, bare)
    )
    assert check_tokenizer(folder, bare.with_chat_template(CHAT), "chat", WHERE) == []


def test_another_data_template_is_warned_of(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, byte_tokenizer(), chat_template=None, template="hh")
    (note,) = check_tokenizer(folder, byte_tokenizer(), "chatml", WHERE)
    assert note.startswith(
        f"{folder} was trained with data.template 'hh', this recipe has 'chatml'"
    )
    assert check_tokenizer(folder, byte_tokenizer(), "hh", WHERE) == []


def test_long_templates_are_shown_where_they_part(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, byte_tokenizer(), template=CHAT + "x" * 99)
    (note,) = check_tokenizer(folder, byte_tokenizer(), CHAT + "x" * 98 + "y", WHERE)
    assert (
        "'xxxxxxxxxxxxxxxxxxxx'" not in note
        and "xxxy'" in note
        and len(note) < 300 + len(str(folder))
    )
