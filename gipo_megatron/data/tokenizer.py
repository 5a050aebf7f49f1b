"""Text to ids and back: the built-in byte-level tokenizer, or any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gipo_megatron.data.hub import is_hub_name, reach_hub
from gipo_megatron.errors import UserError

BYTES = "bytes"


class Tokenizer:
    """A Hugging Face tokenizer with the few verbs this project needs.

    Raises UserError when it has no end-of-text token: responses could never end.
    """

    def __init__(self, inner: PreTrainedTokenizerBase, where: str = "") -> None:
        if inner.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token", where=where, fix="set eos_token in its tokenizer_config.json")
        self.inner = inner
        self.eos_id: int = inner.eos_token_id
        self.bos_id: int | None = inner.bos_token_id
        # Padding is never read (lengths and masks say where it is), so any valid id will do.
        self.pad_id: int = inner.pad_token_id if inner.pad_token_id is not None else inner.eos_token_id
        self.vocab_size: int = max(inner.get_vocab().values()) + 1  # the largest id + 1, added tokens included
        self.chat_template: str | None = inner.chat_template if isinstance(inner.chat_template, str) else None
        # Whether a sequence begins with bos is the tokenizer's own rule: Llama's does, Qwen's and GPT-2's do not.
        self.begins_with_bos: bool = self.bos_id is not None and inner("a").input_ids[0] == self.bos_id

    def encode(self, text: str, markup: bool = False) -> list[int]:
        """Ids without bos or eos. Names of special tokens inside the text are plain text unless `markup` (a rendered chat template)."""
        return list(self.inner(text, add_special_tokens=False, split_special_tokens=not markup, verbose=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; broken UTF-8 becomes the replacement character."""
        return self.inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[dict[str, str]], template: str, generation: bool) -> str:
        """The messages in a jinja chat template; `generation` opens the assistant's turn. jinja2.TemplateError when it refuses them."""
        conversation: list[Any] = list(messages)
        return str(self.inner.apply_chat_template(conversation, chat_template=template, tokenize=False, add_generation_prompt=generation))

    @property
    def fingerprint(self) -> str:
        """sha256 of what maps text to ids: equal for two tokenizers that can be exchanged."""
        if isinstance(self.inner, PreTrainedTokenizerFast):
            definition = json.loads(self.inner.backend_tokenizer.to_str())
            definition = {key: definition[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        else:
            definition = self.inner.get_vocab()
        ids = [self.bos_id, self.eos_id, self.begins_with_bos]
        return hashlib.sha256(json.dumps([definition, ids], sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json and its configuration; `load_tokenizer(folder)` and transformers read it back."""
        self.inner.save_pretrained(str(folder))


def byte_tokenizer() -> Tokenizer:
    """Id = byte for 0 … 255; pad 256, bos 257, eos 258. No merges, so ids(a) + ids(b) = ids(a + b)."""
    symbols = _byte_symbols()
    backend = Backend(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<pad>", "<bos>", "<eos>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos = ("<bos>", 257)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[bos])
    inner = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    return Tokenizer(inner)


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself where it prints, else the next free one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def load_tokenizer(spec: str, where: str = "") -> Tokenizer:
    """`bytes`, a folder with a Hugging Face tokenizer, or a hub name. `where` (a recipe key) is named in errors.

    Raises UserError when the folder holds no tokenizer, or the hub cannot be reached.
    """
    if spec == BYTES:
        return byte_tokenizer()
    if Path(spec).is_dir():
        return Tokenizer(_from_pretrained(spec, where, local=True), where)
    if not is_hub_name(spec):
        raise UserError(f"no tokenizer at {spec!r}", where=where, fix="give an existing folder, a hub name (owner/name), or bytes")
    try:
        inner = AutoTokenizer.from_pretrained(spec, local_files_only=True)  # a cached copy needs no network
    except (OSError, ValueError):
        reach_hub(spec, where, fix="give a folder that holds tokenizer.json, or the built-in tokenizer: bytes")
        inner = _from_pretrained(spec, where, local=False)
    return Tokenizer(inner, where)


def _from_pretrained(spec: str, where: str, local: bool) -> PreTrainedTokenizerBase:
    try:
        inner: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(spec, local_files_only=local)
        return inner
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        fix = (
            "the folder must hold tokenizer.json (or tokenizer.model) and tokenizer_config.json"
            if local
            else "check the name, or give a folder"
        )
        raise UserError(f"cannot load a tokenizer from {spec!r}: {reason}", where=where, fix=fix) from error


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str = "") -> None:
    """UserError unless every id of the tokenizer has a row in an embedding of `vocab_size` rows."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocabulary holds {vocab_size}",
            where=where,
            fix="use the tokenizer this model was trained with",
        )
