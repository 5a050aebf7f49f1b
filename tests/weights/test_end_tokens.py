"""The tokens that end a response: transformers' rule, kept by a checkpoint and by an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.errors import UserError
from gipo_megatron.weights.end_tokens import end_ids, generation_config
from gipo_megatron.weights.hf_config import architecture_from_hf
from gipo_megatron.weights.sources import find_tokenizer
from tests.parity.families import COMMON

EOS = 258
LLAMA: dict[str, Any] = {"model_type": "llama", **COMMON, "vocab_size": 300}


def files(config: Any = None, generation: Any = None) -> dict[str, str]:
    blocks = {"config.json": config, "generation_config.json": generation}
    return {
        name: json.dumps({"eos_token_id": ids, "top_p": 0.9})
        for name, ids in blocks.items()
        if ids is not None
    }


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, (EOS,)),
        (EOS, [EOS], (EOS,)),
        (256, None, (EOS, 256)),
        (256, [257, EOS], (EOS, 256, 257)),
        ([256, 257], 256, (EOS, 256, 257)),
        (-1, [], (EOS,)),
    ],
)
def test_every_named_token_once(config: Any, generation: Any, expected: tuple[int, ...]) -> None:
    assert end_ids(files(config, generation), EOS) == expected


def test_an_export_names_them_all(tmp_path: Path) -> None:
    tokens = {"bos_token_id": 257, "eos_token_id": EOS, "pad_token_id": 256}
    came_with = files(256, [257, 256])
    (tmp_path / "generation_config.json").write_text(generation_config(came_with, tokens))
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert theirs.eos_token_id == [EOS, 256, 257] and theirs.top_p == 0.9
    # unchanged where nothing is to be added, in any order
    same = files(256, [256, EOS])
    assert generation_config(same, tokens) == same["generation_config.json"]
    assert json.loads(generation_config({}, tokens)) == tokens
    assert json.loads(generation_config(files(256), tokens))["eos_token_id"] == [EOS, 256]


def huggingface(folder: Path, config: Any, generation: Any) -> Path:
    folder.mkdir(parents=True)
    byte_tokenizer().save(folder)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_the_rows_of_a_run_end_as_its_policy_does(tmp_path: Path) -> None:
    """From a Hugging Face folder, beside another tokenizer, and from a checkpoint made of it."""
    folder = huggingface(tmp_path / "hf", 256, [257])
    loads = {"models.actor.load": "random", "models.reward.load": str(folder)}
    assert find_tokenizer("", loads).end_ids == (EOS, 256, 257)
    assert find_tokenizer("bytes", loads).end_ids == (EOS, 256, 257)
    assert find_tokenizer("bytes", {"models.actor.load": "random"}).end_ids == (EOS,)
    saved = tmp_path / "checkpoint"
    for role, ids in (("actor", 256), ("critic", 3)):
        home = saved / "huggingface" / role
        home.mkdir(parents=True)
        (home / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": ids}))
    byte_tokenizer().save(saved / "tokenizer")
    (saved / "meta.json").write_text(json.dumps({"format": "gipo_megatron", "roles": {}}))
    assert find_tokenizer("", {"models.actor.load": str(saved)}).end_ids == (EOS, 256)


@pytest.mark.parametrize("ids", ["257", [257, "258"], 2.5, True, [-2], 300, [258, 10**9]])
def test_ids_that_are_none_name_the_file_and_the_key(ids: Any, tmp_path: Path) -> None:
    folder = huggingface(tmp_path / "hf", EOS, ids)
    with pytest.raises(UserError, match="eos_token_id: ") as raised:
        architecture_from_hf(folder)
    assert raised.value.where == str(folder / "generation_config.json")
