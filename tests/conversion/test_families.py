"""HF -> checkpoint at TP 2, PP 2, PP 2 x VPP 3 -> HF, every family in two dtypes: the same bits,
and the same configuration, which transformers 4 reads, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gipo_megatron.conversion.convert import to_hf, to_megatron
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.telemetry.console import Display
from tests.conversion import families
from tests.parity.launch import ranks

pytestmark = pytest.mark.global_rng
SILENT = Display(shown=False)
FILES = ("config.json", "generation_config.json")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def expected_config(source: dict[str, Any]) -> dict[str, Any]:
    """The config.json a model came with, and what transformers 4 reads of it under its own keys."""
    block = dict(source["rope_parameters"])
    four: dict[str, Any] = {"rope_theta": block.pop("rope_theta")}
    return source | (four if block["rope_type"] == "default" else four | {"rope_scaling": block})


def ends(*files: dict[str, Any]) -> set[int]:
    named = [file.get("eos_token_id") for file in files]
    return {i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if i is not None}


def same_configuration(folder: Path, again: Path) -> bool:
    config, generation = (read(folder / name) for name in FILES)
    new_config, new_generation = (read(again / name) for name in FILES)
    if new_config != expected_config(config):
        return False
    if "ForSequenceClassification" in config["architectures"][0]:
        return not new_generation
    kept = {key: value for key, value in new_generation.items() if key != "eos_token_id"}
    before = {key: value for key, value in generation.items() if key != "eos_token_id"}
    every = {byte_tokenizer().eos_id} | ends(config, generation)
    return kept == before and ends(new_generation) == every


def differences(folder: Path, again: Path) -> list[str]:
    """What an exported folder has otherwise than the one it came from."""
    wrong = (
        [] if families.same_bits(families.tensors(folder), families.tensors(again)) else ["tensors"]
    )
    wrong += [] if same_configuration(folder, again) else ["config"]
    return wrong + (
        []
        if (again / "tokenizer.json").is_file() and (again / "README.md").is_file()
        else ["tokenizer or card"]
    )


@pytest.mark.multiprocess
def test_every_family_through_every_layout_of_two(
    tmp_path_factory: pytest.TempPathFactory, mesh: Mesh, tmp_path: Path
) -> None:
    out, found = ranks(2, tmp_path_factory)
    written = found[0]["conversion"]
    assert (
        len(written) == 60 == len(families.FAMILIES) * len(families.DTYPES) * len(families.LAYOUTS)
    )
    wrong = {}
    for name in written:
        to_hf(out / "conversion" / name, tmp_path / name, mesh, verify=False, progress=SILENT)
        if found_wrong := differences(
            out / "conversion" / name.split("/")[0] / "hf", tmp_path / name
        ):
            wrong[name] = found_wrong
    assert not wrong


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_commands_there_and_back(
    name: str, mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verified at both ends; the logits' agreement is that of fp32 arithmetic."""
    folder = families.write_hf(tmp_path / "hf", name, "bfloat16" if "tied" in name else "float32")
    to_megatron(str(folder), tmp_path / "checkpoint", mesh, verify=True, progress=Display())
    to_hf(tmp_path / "checkpoint", tmp_path / "again", mesh, verify=True, progress=Display())
    assert differences(folder, tmp_path / "again") == []
    said = [line for line in capsys.readouterr().out.splitlines() if "within" in line]
    assert len(said) == 2 and all(
        float(line.split("within ")[1].split()[0]) < 1e-5 for line in said
    ), said
    card = (tmp_path / "again" / "README.md").read_text()
    assert ("AutoModelForSequenceClassification" in card) == name.endswith("scorer")
    roles = json.loads((tmp_path / "checkpoint" / "meta.json").read_text())["roles"]
    assert list(roles) == ["reward" if name.endswith("scorer") else "actor"]


def test_fp16_and_mixtures_lose_nothing(mesh: Mesh, tmp_path: Path) -> None:
    """fp16 (Llama 2 as published) stays fp16; a folder of two dtypes becomes fp32."""
    half = families.write_hf(tmp_path / "half", "llama2", "float16")
    to_megatron(str(half), tmp_path / "a", mesh, verify=True, progress=SILENT)
    to_hf(tmp_path / "a", tmp_path / "half_again", mesh, verify=True, progress=SILENT)
    assert differences(half, tmp_path / "half_again") == []
    mixed = families.write_hf(tmp_path / "mixed", "qwen3", "bfloat16")
    original = families.tensors(mixed)
    file = next(
        f for f in sorted(mixed.glob("*.safetensors")) if "model.norm.weight" in load_file(f)
    )
    save_file(
        {k: t.float() if "norm" in k else t for k, t in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    to_megatron(str(mixed), tmp_path / "b", mesh, verify=True, progress=SILENT)
    to_hf(tmp_path / "b", tmp_path / "mixed_again", mesh, verify=True, progress=SILENT)
    again = families.tensors(tmp_path / "mixed_again")
    assert families.same_bits({k: t.float() for k, t in original.items()}, again)
    assert json.loads((tmp_path / "mixed_again" / "config.json").read_text())["dtype"] == "float32"
