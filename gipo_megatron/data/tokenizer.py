"""Text to ids and back: the built-in byte-level tokenizer, or any Hugging Face tokenizer."""

from __future__ import annotations

import copy
import functools
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
# a folder with one of them holds one
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# what the name of a special token that no text uses says, the best first
STAND_INS = ("pad", "reserved")


class Tokenizer:
    """A Hugging Face tokenizer with the few verbs this project needs.

    Raises UserError when it has no end-of-text token: responses could never end.
    """

    def __init__(self, inner: PreTrainedTokenizerBase, where: str = "") -> None:
        if inner.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-text token",
                where=where,
                fix="set eos_token in its tokenizer_config.json",
            )
        self.inner = inner
        self.eos_id: int = inner.eos_token_id
        self.bos_id: int | None = inner.bos_token_id
        # Padding is never read (lengths and masks say where it is), so any valid id will do.
        self.pad_id: int = (
            inner.pad_token_id if inner.pad_token_id is not None else inner.eos_token_id
        )
        # the largest id + 1, added tokens included
        self.vocab_size: int = max(inner.get_vocab().values()) + 1
        self.chat_template: str | None = (
            inner.chat_template if isinstance(inner.chat_template, str) else None
        )
        # Whether a sequence begins with bos is the tokenizer's own rule: Llama's does, Qwen's and
        # GPT-2's do not.
        self.begins_with_bos: bool = (
            self.bos_id is not None and inner("a").input_ids[0] == self.bos_id
        )

    def encode(self, text: str, markup: bool = False) -> list[int]:
        """Ids without bos or eos. Names of special tokens inside the text are plain text unless
        `markup` (a rendered chat template)."""
        return list(
            self.inner(
                text, add_special_tokens=False, split_special_tokens=not markup, verbose=False
            ).input_ids
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; broken UTF-8 becomes the replacement character."""
        return self.inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def render(self, messages: Sequence[dict[str, str]], template: str, generation: bool) -> str:
        """The messages in a jinja chat template; `generation` opens the assistant's turn.
        jinja2.TemplateError when it refuses them."""
        conversation: list[Any] = list(messages)
        return str(
            self.inner.apply_chat_template(
                conversation,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of what maps text to ids: equal for two tokenizers that can be exchanged."""
        if isinstance(self.inner, PreTrainedTokenizerFast):
            definition = json.loads(self.inner.backend_tokenizer.to_str())
            definition = {
                key: definition[key]
                for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")
            }
        else:
            definition = self.inner.get_vocab()
        ids = [self.bos_id, self.eos_id, self.begins_with_bos]
        return hashlib.sha256(json.dumps([definition, ids], sort_keys=True).encode()).hexdigest()

    def difference(self, other: Tokenizer) -> str:
        """What makes the fingerprints differ, in words: sizes, the first id that means another
        text, special tokens, rules."""
        mine, theirs = ({i: text for text, i in t.inner.get_vocab().items()} for t in (self, other))
        said = []
        if self.vocab_size != other.vocab_size:
            said.append(f"vocabulary {self.vocab_size} and {other.vocab_size}")
        first = next((i for i in sorted(mine.keys() & theirs.keys()) if mine[i] != theirs[i]), None)
        if first is not None:
            said.append(f"id {first} is {mine[first]!r} and {theirs[first]!r}")
        for name, a, b in (("bos", self.bos_id, other.bos_id), ("eos", self.eos_id, other.eos_id)):
            if a != b:
                said.append(
                    f"{name} is {mine.get(a)!r} and {theirs.get(b)!r}"
                    if a is not None and b is not None
                    else f"only one has {name}"
                )
        if self.begins_with_bos != other.begins_with_bos:
            said.append("only one writes bos in front")
        return (
            "; ".join(said)
            or "the same ids, cut from text by other rules "
            "(merges, normalizer, pre-tokenizer, added tokens)"
        )

    def scoring_pad(self) -> str | None:
        """A special token that can stand for padding where a score is read at the last token that
        is no padding; None: there is none.

        It occurs in no encoded conversation, unless a message in a chat template spells it out:
        neither bos nor eos, not in the chat template, never cut from text. The tokenizer's own pad
        token, else unk where every byte has a token, else one named for it.
        """
        added = sorted(self.inner.added_tokens_decoder.items())
        named = [
            token.content
            for word in STAND_INS
            for _, token in added
            if token.special and word in token.content.lower()
        ]
        candidates = [self.inner.pad_token, self.inner.unk_token, *named]
        return next(
            (
                token
                for token in candidates
                if isinstance(token, str) and self._never_encoded(token)
            ),
            None,
        )

    def _never_encoded(self, token: str) -> bool:
        number = self.inner.convert_tokens_to_ids(token)
        variables = [
            name for name in ("pad_token", "unk_token") if getattr(self.inner, name) == token
        ]
        if number in (self.bos_id, self.eos_id) or any(
            word in (self.chat_template or "") for word in (token, *variables)
        ):
            return False
        return (
            token != self.inner.unk_token or self._knows_every_byte()
        ) and number not in self.encode(token)

    def _knows_every_byte(self) -> bool:
        """Byte fallback (`<0x00>` … `<0xFF>`) or byte-level BPE, with a token for each of the 256:
        no text is ever unknown."""
        if not isinstance(self.inner, PreTrainedTokenizerFast):
            return False
        definition, vocabulary = (
            json.loads(self.inner.backend_tokenizer.to_str()),
            self.inner.get_vocab(),
        )
        if definition["model"].get("byte_fallback"):
            return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        rule = definition["pre_tokenizer"] or {"type": ""}
        rules = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
        return any(part["type"] == "ByteLevel" for part in rules) and all(
            symbol in vocabulary for symbol in _byte_symbols()
        )

    def with_padding(self, token: str) -> Tokenizer:
        """A copy whose pad token is `token`, on the right; the ids of texts, and the fingerprint,
        stay.  AssertionError for a new token."""
        assert token in self.inner.get_vocab(), f"{token!r} would be a new id"
        inner = copy.deepcopy(self.inner)
        inner.pad_token, inner.padding_side = token, "right"
        return self._beside(inner, self.chat_template)

    def with_chat_template(self, template: str | None) -> Tokenizer:
        """A copy with that chat template, or with none."""
        return self._beside(copy.deepcopy(self.inner), template)

    def _beside(self, inner: PreTrainedTokenizerBase, template: str | None) -> Tokenizer:
        inner.chat_template = template
        return Tokenizer(inner)

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json and its configuration; `load_tokenizer(folder)` and transformers
        read it back."""
        self.inner.save_pretrained(str(folder))
        file = Path(folder) / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        # transformers 5's name for it, which 4 cannot load; both know the older one
        if config["tokenizer_class"] == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for how_it_was_loaded in ("is_local", "local_files_only"):
            config.pop(how_it_was_loaded, None)
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_tokenizer() -> Tokenizer:
    """Id = byte for 0 … 255; pad 256, bos 257, eos 258. No merges, so ids(a) + ids(b) = ids(a +
    b)."""
    symbols = _byte_symbols()
    backend = Backend(
        models.BPE(vocab={symbol: byte for byte, symbol in enumerate(symbols)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<pad>", "<bos>", "<eos>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos = ("<bos>", 257)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[bos]
    )
    inner = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    return Tokenizer(inner)


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself where it prints,
    else the next free one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def load_tokenizer(spec: str, where: str = "") -> Tokenizer:
    """`bytes`, a folder with a Hugging Face tokenizer, or a hub name. `where` (a recipe key) is
    named in errors.

    Raises UserError when the folder holds no tokenizer, or the hub cannot be reached.
    """
    if spec == BYTES:
        return byte_tokenizer()
    if Path(spec).is_dir():
        return Tokenizer(_from_pretrained(spec, where, local=True), where)
    if not is_hub_name(spec):
        raise UserError(
            f"no tokenizer at {spec!r}",
            where=where,
            fix="give an existing folder, a hub name (owner/name), or bytes",
        )
    try:
        # a cached copy needs no network
        inner = AutoTokenizer.from_pretrained(spec, local_files_only=True)
    except (OSError, ValueError):
        reach_hub(
            spec,
            where,
            fix="give a folder that holds tokenizer.json, or the built-in tokenizer: bytes",
        )
        inner = _from_pretrained(spec, where, local=False)
    return Tokenizer(inner, where)


def _from_pretrained(spec: str, where: str, local: bool) -> PreTrainedTokenizerBase:
    try:
        inner: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(spec, local_files_only=local)
        return inner
    # ImportError: a tokenizer.model without the package that reads it
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        fix = (
            "the folder must hold tokenizer.json (or tokenizer.model) and tokenizer_config.json"
            if local
            else "check the name, or give a folder"
        )
        raise UserError(
            f"cannot load a tokenizer from {spec!r}: {reason}", where=where, fix=fix
        ) from error


def tokenizer_facts(folder: Path, known: Tokenizer) -> tuple[str | None, str | None]:
    """Fingerprint and chat template of a Hugging Face folder's tokenizer; None where it holds
    none."""
    name = known.inner.name_or_path
    if name and Path(name).is_dir() and Path(name).samefile(folder):
        return known.fingerprint, known.chat_template
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None, None
    files = [folder / file for file in (*TOKENIZER_FILES, "chat_template.jinja")]
    return _read_facts(
        folder,
        tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()),
    )


@functools.cache
def _read_facts(folder: Path, written: tuple[tuple[int, int], ...]) -> tuple[str, str | None]:
    """Read once for all roles that start from a folder; `written`: its files' times and sizes, so
    that a new file is another call."""
    tokenizer = load_tokenizer(str(folder), str(folder))
    return tokenizer.fingerprint, tokenizer.chat_template


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str = "") -> None:
    """UserError unless every id of the tokenizer has a row in an embedding of `vocab_size` rows."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocabulary holds"
            f" {vocab_size}",
            where=where,
            fix="use the tokenizer this model was trained with",
        )
