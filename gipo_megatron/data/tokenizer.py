"""Text to ids and back: the built-in byte-level tokenizer, or any Hugging Face tokenizer."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gipo_megatron.data.byte_level import byte_level, byte_symbols
from gipo_megatron.data.hub import is_hub_name, reach_hub
from gipo_megatron.errors import UserError, library_errors
from gipo_megatron.files import refuse_pointer

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

BYTES = "bytes"
# a folder with one of these files holds a tokenizer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
TEMPLATE_FILE = "chat_template.jinja"
# parts of the names of special tokens that no text uses, the best first
STAND_INS = ("pad", "reserved")
# stands before the name of a special token that a message spells out; no character of any text
SPELLED = "\ufdd0"


class Tokenizer:
    """A Hugging Face tokenizer, reduced to the functions that this project needs.

    end_ids: the tokens that end a response, eos first. Raises UserError for a tokenizer without an
    end-of-text token (responses could never end), and for chat templates of which none is the
    default.
    """

    def __init__(
        self, inner: PreTrainedTokenizerBase, where: str = "", end_ids: Sequence[int] = ()
    ) -> None:
        if inner.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-text token",
                where=where,
                fix="set eos_token in its tokenizer_config.json",
            )
        self.inner = inner
        self.eos_id: int = inner.eos_token_id
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([self.eos_id, *end_ids]))
        self.bos_id: int | None = inner.bos_token_id
        pad = inner.pad_token_id
        # Lengths and masks mark padding, and nothing reads its id: any valid one will do.
        self.pad_id: int = inner.eos_token_id if pad is None else pad
        # the largest id + 1, added tokens included
        self.vocab_size: int = max(inner.get_vocab().values()) + 1
        # what is used is also what is saved
        inner.chat_template = _default_template(inner.chat_template, where)
        self.chat_template: str | None = inner.chat_template
        # a rule of the tokenizer: true for Llama, false for Qwen and GPT-2
        self.begins_with_bos: bool = self.bos_id is not None and inner("a").input_ids[:1] == [
            self.bos_id
        ]

    @property
    def special_ids(self) -> dict[str, int]:
        """bos_token_id, eos_token_id and pad_token_id, as far as there are such tokens."""
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "pad_token_id": self.inner.pad_token_id,
        }
        return {name: number for name, number in ids.items() if number is not None}

    def encode(self, text: str, markup: bool = False) -> list[int]:
        """Return the ids without bos and eos. Names of special tokens in the text are plain text
        unless `markup` (a rendered chat template), and there too after SPELLED."""
        if markup and SPELLED in text:
            parts = re.split(f"{SPELLED}({self._names.pattern})", text, flags=re.IGNORECASE)
            ids = (self.encode(unspelled(part), i % 2 == 0) for i, part in enumerate(parts))
            return [number for part in ids for number in part]
        encoded = self.inner(
            text, add_special_tokens=False, split_special_tokens=not markup, verbose=False
        )
        return list(encoded.input_ids)

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        """Match the names of special tokens, the longest first."""
        added = self.inner.added_tokens_decoder.values()
        names = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)", re.IGNORECASE)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text without special tokens; broken UTF-8 becomes the replacement
        character."""
        return self.inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def render(self, messages: Sequence[dict[str, str]], template: str, generation: bool) -> str:
        """Return the messages in a jinja chat template, with SPELLED before the names of special
        tokens in their texts; `generation` opens the assistant's turn. A template is a program: it
        may raise any exception."""
        conversation: list[Any] = [
            {**message, "content": self.spelled(message["content"])} for message in messages
        ]
        text = self.inner.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
        return str(text)

    def spelled(self, text: str) -> str:
        """Return the text with SPELLED before each name of a special token."""
        return self._names.sub(lambda found: SPELLED + found[0], unspelled(text))

    @property
    def fingerprint(self) -> str:
        """sha256 of the map from text to ids, equal for two tokenizers that can be exchanged."""
        definition = self.inner.get_vocab()
        if self.inner.is_fast:
            whole = json.loads(self.inner.backend_tokenizer.to_str())
            keys = ("added_tokens", "normalizer", "pre_tokenizer", "model")
            definition = {key: whole[key] for key in keys}
        ids = [self.bos_id, self.eos_id, self.begins_with_bos]
        return hashlib.sha256(json.dumps([definition, ids], sort_keys=True).encode()).hexdigest()

    def difference(self, other: Tokenizer) -> str:
        """Describe why the fingerprints differ: sizes, the first id with another text, special
        tokens, rules."""
        mine, theirs = ({i: text for text, i in t.inner.get_vocab().items()} for t in (self, other))
        found = []
        if self.vocab_size != other.vocab_size:
            found.append(f"vocabulary {self.vocab_size} and {other.vocab_size}")
        for i in sorted(mine.keys() & theirs.keys()):
            if mine[i] != theirs[i]:
                found.append(f"id {i} is {mine[i]!r} and {theirs[i]!r}")
                break
        for name, a, b in (("bos", self.bos_id, other.bos_id), ("eos", self.eos_id, other.eos_id)):
            if (a is None) != (b is None):
                found.append(f"only one has {name}")
            elif a != b:
                found.append(f"{name} is {mine.get(a)!r} and {theirs.get(b)!r}")
        if self.begins_with_bos != other.begins_with_bos:
            found.append("only one writes bos in front")
        rules = "(merges, normalizer, pre-tokenizer, added tokens)"
        return "; ".join(found) or f"the same ids, cut from text by other rules {rules}"

    def scoring_pad(self) -> str | None:
        """Return a special token that can serve as padding where a score is read at the last token
        before padding, or None.

        No encoded conversation contains it: it is neither bos nor eos, not in the chat template,
        and never cut from text. The tokenizer's own pad token comes first, then unk where every
        byte has a token, else one with a fitting name.
        """
        added = sorted(self.inner.added_tokens_decoder.items())
        special = [token.content for _, token in added if token.special]
        named = [text for word in STAND_INS for text in special if word in text.lower()]
        for token in (self.inner.pad_token, self.inner.unk_token, *named):
            if isinstance(token, str) and self._never_encoded(token):
                return token
        return None

    def _never_encoded(self, token: str) -> bool:
        number = self.inner.convert_tokens_to_ids(token)
        names = [name for name in ("pad_token", "unk_token") if getattr(self.inner, name) == token]
        template = self.chat_template or ""
        if number in (self.bos_id, self.eos_id) or any(x in template for x in (token, *names)):
            return False
        if token == self.inner.unk_token and not self._has_every_byte():
            return False
        return number not in self.encode(token)

    def _has_every_byte(self) -> bool:
        """Check for a token for each of the 256 bytes, by byte fallback (`<0x00>` … `<0xFF>`) or
        byte-level BPE: then no text is unknown."""
        if not self.inner.is_fast:
            return False
        definition = json.loads(self.inner.backend_tokenizer.to_str())
        vocabulary = self.inner.get_vocab()
        if definition["model"].get("byte_fallback"):
            return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        rule = definition["pre_tokenizer"] or {"type": ""}
        rules = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
        byte_level = any(part["type"] == "ByteLevel" for part in rules)
        return byte_level and all(symbol in vocabulary for symbol in byte_symbols())

    def with_padding(self, token: str) -> Tokenizer:
        """Return a copy with pad token `token`, on the right. The ids of texts and the fingerprint
        are the same. AssertionError for a new token."""
        assert token in self.inner.get_vocab(), f"{token!r} would be a new id"
        inner = copy.deepcopy(self.inner)
        inner.pad_token, inner.padding_side = token, "right"
        inner.chat_template = self.chat_template
        return Tokenizer(inner, end_ids=self.end_ids)

    def with_end_ids(self, end_ids: Sequence[int]) -> Tokenizer:
        """Return this tokenizer with `end_ids` beside eos as the tokens that end a response."""
        return Tokenizer(self.inner, end_ids=end_ids)

    def with_chat_template(self, template: str | None) -> Tokenizer:
        """Return a copy with that chat template, or with none."""
        inner = copy.deepcopy(self.inner)
        inner.chat_template = template
        return Tokenizer(inner, end_ids=self.end_ids)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and its configuration, for `load_tokenizer(folder)` and for
        transformers 4 and 5.

        Both read PreTrainedTokenizerFast from tokenizer.json unchanged. The classes of a family do
        not: version 4's put bos in front, version 5's write other rules. The class needs its
        inputs: by default version 4's adds token_type_ids, which these models refuse.
        """
        with library_errors("cannot write the tokenizer", where=str(folder), fix="free some space"):
            self.inner.save_pretrained(str(folder))
        file = Path(folder) / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        if self.inner.is_fast:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config["model_input_names"] = ["input_ids", "attention_mask"]
        # version 5 reads the list under both names, version 4 under the older one
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        # auto_map names code of another folder
        for load_option in ("backend", "is_local", "local_files_only", "auto_map"):
            config.pop(load_option, None)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")


def unspelled(text: str) -> str:
    return text.replace(SPELLED, "")


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer with id = byte for 0 … 255, pad 256, bos 257, eos 258. It has no merges,
    so ids(a) + ids(b) = ids(a + b)."""
    return Tokenizer(byte_level())


def load_tokenizer(spec: str, where: str = "") -> Tokenizer:
    """Load `bytes`, a folder with a Hugging Face tokenizer, or a hub name. Errors name `where`, a
    recipe key.

    Raises UserError when the folder holds no tokenizer, or the hub cannot be reached.
    """
    if spec == BYTES:
        return byte_tokenizer()
    if Path(spec).is_dir():
        for name in (*TOKENIZER_FILES, TEMPLATE_FILE):
            if (Path(spec) / name).is_file():
                refuse_pointer(Path(spec) / name)
        return _from_pretrained(spec, where, local=True)
    if not is_hub_name(spec):
        raise UserError(
            f"no tokenizer at {spec!r}",
            where=where,
            fix="give an existing folder, a hub name (owner/name), or bytes",
        )
    try:
        return _from_pretrained(spec, where, local=True)  # a cached copy needs no network
    except UserError:
        fix = "give a folder that holds tokenizer.json, or the built-in tokenizer: bytes"
        reach_hub(spec, where, fix)
        return _from_pretrained(spec, where, local=False)


def _from_pretrained(spec: str, where: str, local: bool) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import

    fix = "check the name, or give a folder"
    if local:
        fix = "the folder must hold tokenizer.json (or tokenizer.model) and tokenizer_config.json"
    with library_errors(f"cannot load a tokenizer from {spec!r}", where=where, fix=fix):
        # code of a model's repository is never run, and transformers would stop to ask
        inner = AutoTokenizer.from_pretrained(spec, local_files_only=local, trust_remote_code=False)
        tokenizer = Tokenizer(inner, where)
        tokenizer.decode(tokenizer.encode("a"))  # some wrong values show only in its use
        return tokenizer


def _default_template(found: Any, where: str) -> str | None:
    """Return a tokenizer's chat template; of several named ones that called `default`, as
    `apply_chat_template` does."""
    template = found.get("default") if isinstance(found, dict) else found
    if isinstance(template, str) or found is None:
        return template
    names = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
    raise UserError(
        f"the tokenizer has no chat template called default; found: {names}",
        where=where,
        fix="name one of them `default` in its tokenizer_config.json, or save the one to use as"
        " chat_template.jinja",
    )


def tokenizer_facts(folder: Path, known: Tokenizer) -> tuple[str | None, str | None]:
    """Return fingerprint and chat template of a folder's tokenizer; None where it holds none."""
    name = known.inner.name_or_path
    if name and Path(name).is_dir() and Path(name).samefile(folder):
        return known.fingerprint, known.chat_template
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None, None
    files = [folder / file for file in (*TOKENIZER_FILES, TEMPLATE_FILE)]
    stats = [file.stat() for file in files if file.is_file()]
    return _read_facts(folder, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@functools.cache
def _read_facts(folder: Path, written: tuple[tuple[int, int], ...]) -> tuple[str, str | None]:
    """Read once for all roles that start from a folder. `written`, its files' times and sizes,
    makes a changed file another call."""
    tokenizer = load_tokenizer(str(folder), str(folder))
    return tokenizer.fingerprint, tokenizer.chat_template


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str = "") -> None:
    """Raises UserError when an id of the tokenizer has no row in an embedding of that size."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocabulary holds"
            f" {vocab_size}",
            where=where,
            fix="use the tokenizer this model was trained with",
        )
