"""The place of weights, and a check of their tokenizer and chat template against the recipe's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gipo_megatron.data.hub import is_hub_name, reach_hub
from gipo_megatron.data.templates import choose, parting
from gipo_megatron.data.tokenizer import (
    TOKENIZER_FILES,
    Tokenizer,
    load_tokenizer,
    tokenizer_facts,
)
from gipo_megatron.errors import UserError, library_errors
from gipo_megatron.weights.checkpoints import read_hf_files, read_meta, weights_kind
from gipo_megatron.weights.end_tokens import end_ids
from gipo_megatron.weights.peft_config import CONFIG, base_name

_FIX = "train that stage first, or give a Hugging Face folder or a checkpoint"


def locate(load: str, where: str, fix: str = _FIX) -> Path:
    """Return a local folder for `load`: itself, or the hub's snapshot.

    Raises UserError when there is neither.
    """
    if Path(load).exists():
        return Path(load)
    if not is_hub_name(load) or load.startswith("runs/"):
        raise UserError(f"nothing to load at {load!r}", where=where, fix=fix)
    from huggingface_hub import snapshot_download  # slow to import

    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.jinja"]
    with suppress(Exception):
        # a cached copy needs no network
        cached = Path(snapshot_download(load, allow_patterns=patterns, local_files_only=True))
        if any(cached.glob("*.safetensors")):  # a snapshot may hold a tokenizer alone
            return cached
    reach_hub(load, where, fix)
    with library_errors(f"cannot download {load!r}", where=where, fix=fix):
        return Path(snapshot_download(load, allow_patterns=patterns))


def adapted_model(folder: Path) -> Path:
    """Return the Hugging Face folder of the model that a PEFT folder's adapters belong to. Raises
    UserError where it is none, or is not there."""
    where = str(folder / CONFIG)
    fix = "correct base_model_name_or_path, or put the model there"
    model = locate(base_name(folder), where, fix)
    if weights_kind(model) != "huggingface":
        raise UserError(f"the base {model} is no Hugging Face model", where=where, fix=fix)
    return model


def stored_hf_files(folder: Path) -> dict[str, str]:
    """Return `read_hf_files` of weights: of a Hugging Face folder, or of the model that the first
    role of a checkpoint began from, the policy where it has one."""
    kind = weights_kind(folder)
    if kind != "checkpoint":
        return read_hf_files(adapted_model(folder) if kind == "adapter" else folder)
    homes = sorted((folder / "huggingface").glob("*"))
    return read_hf_files(homes[0]) if homes else {}


def find_tokenizer(spec: str, loads: Mapping[str, str]) -> Tokenizer:
    """Return the tokenizer that `spec` names or, for an empty one, that of the first weights; with
    the end tokens of these weights.

    loads: {recipe key: weights}. Raises UserError for an empty `spec` when all weights are random.
    """
    where, load = next(((w, load) for w, load in loads.items() if load != "random"), ("", ""))
    folder = locate(load, where) if load else None
    if spec:
        tokenizer = load_tokenizer(spec, where="model.tokenizer")
    elif folder is not None:
        tokenizer = load_tokenizer(str(_tokenizer_folder(folder)), where=where)
    else:
        raise UserError(
            "all weights are random, so there is no tokenizer beside them",
            where="model.tokenizer",
            fix="give a folder or a hub name, or `bytes`, the built-in one",
        )
    if folder is None:
        return tokenizer
    return tokenizer.with_end_ids(end_ids(stored_hf_files(folder), tokenizer.eos_id))


def _tokenizer_folder(folder: Path) -> Path:
    """A checkpoint has a folder for its tokenizer; a Hugging Face folder holds it itself, and that
    of adapters where theirs holds none."""
    beside = folder / "tokenizer"
    if beside.is_dir():
        return beside
    own = any((folder / file).is_file() for file in TOKENIZER_FILES)
    return folder if own or not (folder / CONFIG).is_file() else adapted_model(folder)


def stored_fingerprint(folder: Path, known: Tokenizer) -> str | None:
    """Return the fingerprint of the tokenizer that weights were made with, where it is recorded.

    known: a loaded tokenizer; the one in `folder` is not read again when it is this one.
    """
    if weights_kind(folder) == "checkpoint":
        return read_meta(folder).tokenizer
    return tokenizer_facts(_tokenizer_folder(folder), known)[0]


def tokenizer_difference(one: Path, other: Path) -> str:
    """Return how the tokenizers of two folders of weights differ, where both can be read."""
    folders = [_tokenizer_folder(folder) for folder in (one, other)]
    if not all(folder.is_dir() for folder in folders):
        return ""
    a, b = (load_tokenizer(str(folder), str(folder)) for folder in folders)
    return f": {a.difference(b)}"


def check_tokenizer(folder: Path, tokenizer: Tokenizer, template: str, where: str) -> list[str]:
    """Compare the tokenizer and template that weights were made with to the recipe's.

    A checkpoint records both in meta.json (older ones only the first); of a Hugging Face folder the
    tokenizer in it counts, where it holds one. template: the recipe's `data.template`. Returns
    warnings. Raises UserError for another tokenizer, whose ids mean another text, and for another
    chat template where the recipe uses the tokenizer's.
    """
    trained_with = None
    if weights_kind(folder) == "checkpoint":
        meta, home = read_meta(folder), folder / "tokenizer"
        fingerprint, chat_template = meta.tokenizer, meta.chat_template
        trained_with = meta.template
    else:
        home = _tokenizer_folder(folder)
        fingerprint, chat_template = tokenizer_facts(home, tokenizer)
    fix = f"model.tokenizer={home}"
    if fingerprint not in (None, tokenizer.fingerprint):
        how = ""
        if home.is_dir():
            how = f": {load_tokenizer(str(home), where).difference(tokenizer)}"
        raise UserError(
            f"{folder} was made with another tokenizer than this recipe's{how}",
            where=where,
            fix=fix,
        )
    uses_own = choose(template, "messages", tokenizer).name == "chat"
    mine = tokenizer.chat_template if uses_own else None
    if mine is not None and chat_template not in (None, mine):
        raise UserError(
            f"two chat templates: {folder} has {parting(chat_template, mine)}, the recipe's"
            f" tokenizer ({tokenizer.inner.name_or_path}) has {parting(mine, chat_template)}",
            where=where,
            fix=f"{fix}, or write data.template explicitly: hh, plain, chatml, or a jinja template",
        )
    if trained_with in (None, template):
        return []
    return [
        f"{folder} was trained with data.template {parting(trained_with, template)}, this recipe"
        f" has {parting(template, trained_with)}: other words around the same conversation"
    ]
