from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gipo_megatron.data.tokenizer import byte_tokenizer, check_vocabulary, load_tokenizer
from gipo_megatron.errors import UserError
from tests.data.fixtures import SHARED, needs_shared_data

TEXTS = ["", "plain", "  two  spaces\n\nand\tcontrol \x00\x01", "Grüße, 日本語 🙂", "<eos> is text here, <bos> too"]


def test_bytes_are_the_ids() -> None:
    tokenizer = byte_tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258, 259)
    assert tokenizer.begins_with_bos


def test_special_tokens_are_read_in_markup_only_and_never_decoded() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("a<eos>", markup=True) == [97, 258]
    assert tokenizer.decode([257, 97, 258, 256]) == "a"
    assert tokenizer.decode([97, 0xFF]) == "a�"


def test_saved_bytes_are_read_by_transformers_and_by_us(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("é<eos>").input_ids == [257, 0xC3, 0xA9, 258]
    assert ours.fingerprint == byte_tokenizer().fingerprint
    assert [ours.encode(text) for text in TEXTS] == [list(text.encode()) for text in TEXTS]


@needs_shared_data
@pytest.mark.parametrize(("name", "bos"), [("mistral_v1", True), ("hh_bytebpe_4k", False)])
def test_saving_keeps_the_fingerprint(tmp_path: Path, name: str, bos: bool) -> None:
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / name))
    assert tokenizer.begins_with_bos == bos
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == tokenizer.fingerprint != byte_tokenizer().fingerprint
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@needs_shared_data
def test_sizes_and_ids_of_the_real_tokenizers() -> None:
    mistral = load_tokenizer(str(SHARED / "tokenizers" / "mistral_v1"))
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id, mistral.pad_id) == (32000, 1, 2, 2)
    assert load_tokenizer(str(SHARED / "tokenizers" / "hh_bytebpe_4k")).vocab_size == 4096


def test_vocabulary_must_hold_the_ids() -> None:
    check_vocabulary(byte_tokenizer(), 259)
    check_vocabulary(byte_tokenizer(), 320)
    with pytest.raises(UserError, match=r"ids up to 258, the model's vocabulary holds 258"):
        check_vocabulary(byte_tokenizer(), 258, "models.actor")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load a tokenizer") as raised:
        load_tokenizer(str(tmp_path), "model.tokenizer")
    assert raised.value.where == "model.tokenizer" and raised.value.fix


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path / "missing"), "model.tokenizer")


def test_a_hub_that_is_not_there_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match="cannot be reached") as raised:
        load_tokenizer("nobody/nothing", "model.tokenizer")
    assert "folder" in raised.value.fix
