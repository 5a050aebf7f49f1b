"""The tokens that end a response, as transformers' generate() has them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gipo_megatron.weights.checkpoints import HF_FILES
from gipo_megatron.weights.hf_values import as_ids

GENERATION = "generation_config.json"


def end_ids(files: Mapping[str, str], eos_id: int) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's eos, then eos_token_id of config.json and
    generation_config.json. Chat models name several: the end of a turn, the end of the text.

    files: {name: text}, as `read_hf_files` returns them.
    """
    named = [
        as_ids(json.loads(files[name]).get("eos_token_id")) for name in HF_FILES if name in files
    ]
    return tuple(dict.fromkeys([eos_id, *(number for ids in named for number in ids)]))


def generation_config(files: Mapping[str, str], tokens: Mapping[str, int]) -> str:
    """Return the generation_config.json of an export: the one that the model came with, else
    `tokens`; either names all of `end_ids`. tokens: ids of the tokenizer, eos_token_id too."""
    ends = end_ids(files, tokens["eos_token_id"])
    source = files.get(GENERATION, json.dumps(dict(tokens), indent=2) + "\n")
    config = json.loads(source)
    if {*as_ids(config.get("eos_token_id"))} == {*ends}:
        return source
    config["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    return json.dumps(config, indent=2) + "\n"
