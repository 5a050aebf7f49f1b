from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from gipo_megatron.data.tokenizer import (
    Tokenizer,
    byte_tokenizer,
    check_vocabulary,
    load_tokenizer,
    unspelled,
)
from gipo_megatron.errors import UserError
from tests.data.fixtures import SHARED, needs_shared_data
from tests.injections import ALL

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TEXTS = [
    "",
    "plain",
    "  two  spaces\n\nand\tcontrol \x00\x01",
    "Grüße, 日本語 🙂",
    "<eos> is text here, <bos> too",
]


def small_tokenizer(
    space: str, bytes_too: bool = True, pad: str | None = None, special: Sequence[str] = ()
) -> Tokenizer:
    """Llama-2's shape: unk, bos, eos, bytes, the ASCII characters; then `special`.

    space: "each" piece between special tokens gets one in front (a normalizer), or only the "first"
    (Metaspace).
    """
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256) if bytes_too),
        "▁",
        *map(chr, range(33, 127)),
    ]
    backend = Backend(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=bytes_too,
        )
    )
    if space == "each":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in ("<unk>", "<s>", "</s>", *special)
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    inner = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
    )
    return Tokenizer(inner)


def test_bytes_are_the_ids() -> None:
    tokenizer = byte_tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (
        256,
        257,
        258,
        259,
    )
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


@pytest.mark.parametrize("space", ["each", "first"])
def test_unk_pads_where_every_byte_has_a_token(space: str) -> None:
    assert small_tokenizer(space).scoring_pad() == "<unk>"
    assert 0 not in small_tokenizer(space).encode("日本 <unk> \x00")  # by hand: unk is id 0
    assert 0 in small_tokenizer(space, bytes_too=False).encode("日本")
    assert small_tokenizer(space, bytes_too=False).scoring_pad() is None


@pytest.mark.parametrize(
    ("pad", "special", "template", "expected"),
    [
        ("<p>", ("<p>",), None, "<p>"),  # its own
        (
            "</s>",
            ("<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
            None,
            "<|finetune_right_pad_id|>",
        ),
        (
            "</s>",
            ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
            None,
            "<|reserved_special_token_0|>",
        ),
        ("<s>", ("<|end|>",), None, None),
        (None, ("[PAD]", "<|reserved_0|>"), "[PAD]" + TEMPLATE, "<|reserved_0|>"),
        ("<p>", ("<p>",), "{{ pad_token }}" + TEMPLATE, None),
        ("<unk>", (), None, None),  # text may become unk here
    ],
)
def test_which_token_pads_for_a_score(
    pad: str | None, special: tuple[str, ...], template: str | None, expected: str | None
) -> None:
    tokenizer = small_tokenizer(
        "each", bytes_too=False, pad=pad, special=special
    ).with_chat_template(template)
    assert tokenizer.scoring_pad() == expected


def test_byte_level_bpe_never_needs_unk() -> None:
    assert byte_tokenizer().scoring_pad() == "<pad>"
    inner = byte_tokenizer().inner
    inner.pad_token, inner.unk_token = "<eos>", "<pad>"
    assert Tokenizer(inner).scoring_pad() == "<pad>"
    definition = json.loads(inner.backend_tokenizer.to_str())
    del definition["model"]["vocab"]["a"]  # now one byte has no token
    fewer = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(json.dumps(definition)),
        eos_token="<eos>",
        unk_token="<pad>",
    )
    assert Tokenizer(fewer).scoring_pad() is None


def test_padding_changes_no_id_and_is_saved(tmp_path: Path) -> None:
    before = small_tokenizer("each")
    after = before.with_padding("<unk>")
    assert (before.inner.pad_token, before.pad_id, after.pad_id) == (None, 2, 0)
    after.save(tmp_path)
    again, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == after.fingerprint == before.fingerprint
    assert (theirs.pad_token, theirs.pad_token_id, theirs.padding_side) == ("<unk>", 0, "right")
    assert theirs(["a", "ab"], padding=True).input_ids == [
        [1, *before.encode("a"), 0],
        [1, *before.encode("ab")],
    ]
    assert [again.encode(text) for text in TEXTS] == [before.encode(text) for text in TEXTS]
    with pytest.raises(AssertionError, match="new id"):
        before.with_padding("<p>")


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}\n", None])
def test_the_chat_template_is_saved_letter_by_letter(tmp_path: Path, template: str | None) -> None:
    tokenizer = small_tokenizer("each").with_chat_template("{{ 1 }}").with_chat_template(template)
    assert tokenizer.with_padding("<unk>").chat_template == template
    tokenizer.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == template


def test_transformers_4_knows_the_class_of_a_saved_tokenizer(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )


@pytest.mark.global_rng
def test_a_score_is_read_at_eos_under_our_padding_and_not_under_eos_as_padding() -> None:
    """What scoring_pad is for: transformers scores a padded row as it scores the row alone."""
    tokenizer = small_tokenizer("each")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).eval()
    rows = [[1, *tokenizer.encode("a"), 2], [1, *tokenizer.encode("a longer one"), 2]]
    model.config.pad_token_id = None
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits.item() for row in rows]
        scored = {}
        for pad in (tokenizer.with_padding("<unk>").pad_id, tokenizer.eos_id):
            model.config.pad_token_id = pad
            width = max(map(len, rows))
            batch = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            scored[pad] = model(batch, attention_mask=mask).logits[:, 0].tolist()
    assert scored[0] == pytest.approx(alone, abs=1e-6)
    assert abs(scored[2][0] - alone[0]) > 1e-4


def test_the_difference_in_words() -> None:
    ours, other = small_tokenizer("each"), small_tokenizer("each", special=("<p>",))
    assert ours.difference(other) == f"vocabulary {ours.vocab_size} and {ours.vocab_size + 1}"
    assert "by other rules" in ours.difference(small_tokenizer("first"))
    said = byte_tokenizer().difference(ours)
    assert (
        "id 0 is 'Ā' and '<unk>'" in said
        and "bos is '<bos>' and '<s>'" in said
        and "eos is '<eos>' and '</s>'" in said
    )


@needs_shared_data
@pytest.mark.parametrize(("name", "pad"), [("mistral_v1", "<unk>"), ("hh_bytebpe_4k", "<pad>")])
def test_scoring_pads_of_the_real_tokenizers(name: str, pad: str) -> None:
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / name))
    assert tokenizer.scoring_pad() == pad
    assert tokenizer.with_padding(pad).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("text", [*ALL.values(), "<EOS>", "<<eos>>"])
def test_a_message_in_a_chat_template_cannot_write_a_control_token(text: str) -> None:
    """The only special ids are the template's, and all ids but those are the bytes of the text."""
    tokenizer = byte_tokenizer()
    rendered = tokenizer.render(
        [{"role": "user", "content": text}], "{{ bos_token }}{{ messages[0].content }}<eos>", True
    )
    ids = tokenizer.encode(rendered, markup=True)
    assert [i for i, number in enumerate(ids) if number > 255] == [0, len(ids) - 1]
    assert bytes(ids[1:-1]) == text.encode() and unspelled(rendered) == f"<bos>{text}<eos>"
