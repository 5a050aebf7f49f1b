"""Model folders that are half downloaded, mixed or edited by hand: one error with file and key."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gipo_megatron.errors import UserError
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.architecture import folder_architecture, stored_architecture
from gipo_megatron.weights.checkpoints import weights_kind
from gipo_megatron.weights.hf_checks import KINDS
from gipo_megatron.weights.hf_config import architecture_from_config
from gipo_megatron.weights.hf_files import open_weights, save_tensors
from tests.parity.families import COMMON

LLAMA: dict[str, Any] = {"model_type": "llama", **COMMON}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def tensors() -> dict[str, torch.Tensor]:
    """What names the sizes of COMMON's model: 4 layers, 32 wide, 4 heads and 2 groups of 8."""
    found = {"model.embed_tokens.weight": torch.zeros(250, 32)}
    for layer in range(4):
        at = f"model.layers.{layer}."
        found[f"{at}self_attn.q_proj.weight"] = torch.zeros(32, 32)
        found[f"{at}self_attn.k_proj.weight"] = torch.zeros(16, 32)
        found[f"{at}mlp.gate_proj.weight"] = torch.zeros(48, 32)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def split(folder: Path) -> list[str]:
    """Replace the single file by two shards and their index."""
    names = sorted(tensors())
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, (names[:3], names[3:]), strict=True):
        save_file({name: tensors()[name] for name in part}, folder / file)
    write_index(folder, {name: files[names.index(name) >= 3] for name in names})
    (folder / "model.safetensors").unlink()
    return files


# ------------------------------------------------------------------------------- files of weights


def test_stale_shards_beside_a_single_file(folder: Path) -> None:
    single = (folder / "model.safetensors").read_bytes()
    split(folder)
    assert open_weights(folder).shapes.keys() == tensors().keys()
    (folder / "model.safetensors").write_bytes(single)
    with pytest.raises(UserError) as raised:
        open_weights(folder)
    said = str(raised.value)
    assert "model.safetensors, which" in said and INDEX in said and "-of-00002" in said


def test_an_index_of_the_single_file_is_no_second_model(folder: Path) -> None:
    write_index(folder, dict.fromkeys(tensors(), "model.safetensors"))
    save_file({"old": torch.zeros(1)}, folder / "model-00001-of-00003.safetensors")  # in no index
    assert open_weights(folder).shapes.keys() == tensors().keys()


def unfinished(folder: Path) -> None:
    second = folder / split(folder)[1]
    second.rename(folder / f"{second.name}.incomplete")


def no_index(folder: Path) -> None:
    split(folder)
    (folder / INDEX).unlink()


def shard_is_pointer(folder: Path) -> None:
    (folder / split(folder)[0]).write_bytes(POINTER)


def one_too_few(folder: Path) -> None:
    split(folder)
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(content))


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unfinished": (unfinished, r"model-00002-of-00002\.safetensors \(missing\)"),
    "no index": (no_index, "no safetensors weights here"),
    "a pointer": (shard_is_pointer, "model-00001-of-00002.safetensors is a Git LFS pointer"),
    "the single file a pointer": (
        lambda folder: (folder / "model.safetensors").write_bytes(POINTER),
        "model.safetensors is a Git LFS pointer",
    ),
    "empty": (lambda folder: os.truncate(folder / "model.safetensors", 0), r"\(0 bytes\)"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 4000), r"\(4000 bytes\)"),
    "a tensor too few": (one_too_few, "lm_head.weight"),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "weight_map: None"),
    "a map of numbers": (lambda folder: write_index(folder, {"a": 1}), "weight_map.a: 1"),
    "a map of files": (lambda folder: write_index(folder, ["a"]), "weight_map: "),
    "an index of one word": (lambda folder: (folder / INDEX).write_text("3"), "a JSON int"),
    "index a pointer": (lambda folder: (folder / INDEX).write_bytes(POINTER), "Git LFS"),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_that_are_not_whole(name: str, folder: Path) -> None:
    change, said = FILES[name]
    change(folder)
    with pytest.raises(UserError, match=said) as raised:
        open_weights(folder)
    assert str(folder) in raised.value.where and raised.value.fix


def test_pickled_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is not read"):
        weights_kind(folder)


# ------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": None}, "rope_theta: None is not a number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta: '1e6'"),
        ({"rms_norm_eps": "1e-05"}, "rms_norm_eps: '1e-05'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan"),
        ({"hidden_size": 32.0, "vocab_size": "250"}, "vocab_size: '250'.*; hidden_size: 32.0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false' is not true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: 'LlamaForCausalLM'"),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear' is not an object"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling lacks rope_type"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling \(linear\) lacks factor"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "rope_scaling.factor: '8'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor is not below"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "lacks low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "two values of rope_theta: 1000000.0 in rope_parameters, 10000.0 beside it",
        ),
        (
            {
                "rope_scaling": LLAMA3 | {"factor": 2.0},
                "rope_parameters": LLAMA3 | {"rope_theta": 1e4},
            },
            "two values of factor: 8.0 in rope_parameters, 2.0",
        ),
        ({"pad_token_id": 250}, r"pad_token_id: 250 is not in the vocabulary \(vocab_size 250\)"),
        ({"eos_token_id": [2, 999]}, "eos_token_id: 999 is not in the vocabulary"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value"),
        ({"num_attention_heads": 5, "num_key_value_heads": 1}, "hidden_size 32 is no multiple"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        architecture_from_config({**LLAMA, **changes}, "x/config.json")
    assert raised.value.where == "x/config.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"pad_token_id": -1, "eos_token_id": [1, 2], "bos_token_id": None},
        {"head_dim": None, "rope_scaling": None, "sliding_window": None, "mlp_bias": None},
        {"rope_theta": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)
def test_what_published_models_leave_out_is_right(changes: dict[str, Any]) -> None:
    expected = Architecture(4, 32, 48, 4, 2, 8, 250, 64)
    assert architecture_from_config({**LLAMA, **changes}, "") == expected


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=2), st.none()),
)  # fmt: skip


@settings(derandomize=True, deadline=None, database=None)
@given(st.dictionaries(st.sampled_from([*KINDS]), VALUES, min_size=1, max_size=3))
def test_any_value_at_all_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        assert isinstance(architecture_from_config({**LLAMA, **changes}, "c"), Architecture)
    except UserError as error:
        assert error.where == "c"


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("vocab_size", 32000000, 250),
        ("hidden_size", 64, 32),
        ("intermediate_size", 96, 48),
        ("num_hidden_layers", 6, 4),
        ("num_key_value_heads", 4, 16),
        ("head_dim", 16, 32),
    ],
)
def test_sizes_are_those_of_the_tensors(key: str, wrong: int, right: int, folder: Path) -> None:
    folder_architecture(folder)
    (folder / "config.json").write_text(json.dumps({**LLAMA, key: wrong}))
    with pytest.raises(UserError, match=rf"{key}.* \d+, by the tensors {right}") as raised:
        stored_architecture(str(folder), "actor", "k", may_be_hub=False, network=False)
    assert str(folder / "config.json") == raised.value.where


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "config.json is a Git LFS pointer"),
        (b"", "cannot read config.json: JSONDecodeError"),
        (b"[]", "a JSON list, not an object"),
        (b'{"a": "\xff"}', "cannot read config.json: UnicodeDecodeError"),
        (b"[" * 10**5, "cannot read config.json: RecursionError"),
    ],
)
def test_a_file_that_is_no_configuration(content: bytes, said: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        folder_architecture(folder)


@pytest.mark.parametrize(("folder_mode", "mode"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_who_may_read_the_folder_may_read_its_weights(
    folder_mode: int, mode: int, tmp_path: Path
) -> None:
    """A server often runs as another user."""
    tmp_path.chmod(folder_mode)
    file = tmp_path / "model.safetensors"
    save_tensors(file, {"a": torch.ones(2)})
    assert file.stat().st_mode & 0o777 == mode


def test_weights_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write model\.safetensors"):
        save_tensors(tmp_path / "none" / "model.safetensors", {"a": torch.ones(2)})
