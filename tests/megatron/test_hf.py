from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gipo_megatron.errors import UserError
from gipo_megatron.megatron.heads import GroupHead, all_logits
from gipo_megatron.megatron.hf import (
    export_weights,
    load_group_head,
    load_hf,
    save_group_head,
    save_hf,
    saved_group_head,
)
from gipo_megatron.megatron.hf_table import table
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.megatron.outputs import last_token_score
from gipo_megatron.specs import Architecture, HeadSpec, Precision
from gipo_megatron.weights.hf_config import architecture_from_hf, config_for
from tests.parity import families
from tests.parity.outputs_reference import ReadoutCase

FP32 = Precision("fp32")


def loaded(
    folder: Path, mesh: Mesh, head: str | None = None
) -> tuple[list, Architecture, tuple[str, ...]]:
    architecture = architecture_from_hf(folder)
    chunks = build_chunks(architecture, mesh, FP32, head=head, initialise=head is not None)
    return chunks, architecture, load_hf(folder, chunks, mesh, architecture, head=head)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    families.hf_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", families.FAMILIES)
def test_folder_to_megatron_and_back(name: str, mesh: Mesh, tmp_path: Path) -> None:
    """transformers' own folder gives its logits within 1e-5; the folder written back, in several
    shards, gives them exactly."""
    reference, ids = families.hf_model(name), families.tokens()
    reference.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    chunks, architecture, fresh = loaded(tmp_path / "in", mesh)
    assert fresh == ()
    with torch.no_grad():
        logits = all_logits(chunks[0], chunks[0](ids, None, None))[..., : families.VOCAB]
        expected = reference(ids).logits
        assert float((logits - expected).abs().max()) < 1e-5
        (tmp_path / "out").mkdir()
        save_hf(
            tmp_path / "out", export_weights(chunks, mesh, architecture), mesh, shard_bytes=20_000
        )
        (tmp_path / "out" / "config.json").write_text(
            json.dumps(config_for(architecture, "float32"))
        )
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        assert torch.equal(again(ids).logits, expected)
    assert architecture_from_hf(tmp_path / "out") == architecture


@pytest.mark.multiprocess
def test_every_family_at_every_layout_of_two(model_cells: list[dict[str, Any]]) -> None:
    checked = 0
    for layout in families.LAYOUTS:
        for name in families.FAMILIES:
            errors = [cells[f"{layout}/{name}/logits"] for cells in model_cells]
            errors = [e for e in errors if e is not None]
            assert errors and max(errors) < 1e-5, (layout, name, errors)
            assert all(cells[f"{layout}/{name}/export"] for cells in model_cells), (layout, name)
            checked += 1
    assert checked == 24


@pytest.mark.multiprocess
def test_gradients_of_what_llama_has_not(model_cells: list[dict[str, Any]]) -> None:
    """Tied embeddings, QKV bias and QK-norm through the training engine, per tensor; tied copies
    agree after a step."""
    names = [
        f"gradients/{layout}/{name}"
        for layout in families.LAYOUTS
        for name in ("llama3_tied", "qwen2", "qwen3")
    ]
    errors = [cells[name] for cells in model_cells for name in names]
    assert len(errors) == 24 and max(errors) < 1e-5, errors
    tied = [same for cells in model_cells for name, same in cells.items() if name.endswith("/tied")]
    assert len(tied) == 8 and all(tied)


def test_a_reward_model_is_a_sequence_classifier(mesh: Mesh, llama: Path, tmp_path: Path) -> None:
    chunks, architecture, fresh = loaded(llama, mesh, head="score")
    # a language model has none: the head keeps its initial weights
    assert fresh == ("score.weight",)
    sequences = ReadoutCase.make().sequences
    # 0 pads
    ids = torch.where(
        torch.arange(12) < sequences.lengths[:, None], sequences.tokens.clamp(min=1), 0
    )
    with torch.no_grad():
        scores = last_token_score(chunks[0](ids, None, None), sequences)
    save_hf(tmp_path, export_weights(chunks, mesh, architecture, head="score"), mesh)
    (tmp_path / "config.json").write_text(
        json.dumps(config_for(architecture, "float32", head="score", tokens={"pad_token_id": 0}))
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, 0], scores, atol=1e-6, rtol=1e-5)
    again, _, fresh = loaded(tmp_path, mesh, head="value")
    assert fresh == () and torch.equal(again[0].output_layer.weight, chunks[0].output_layer.weight)


def problem(mesh: Mesh, state: dict[str, Tensor], **changes: Any) -> str:
    reference = families.hf_model("llama")
    folder_like = replace(ARCHITECTURE_OF_LLAMA, **changes)
    chunks = build_chunks(folder_like, mesh, FP32, seed=1)
    before = [p.detach().clone() for p in chunks[0].parameters()]
    with pytest.raises(UserError) as error:
        load_hf({**reference.state_dict(), **state}, chunks, mesh, folder_like)
    assert all(torch.equal(p, q) for p, q in zip(before, chunks[0].parameters(), strict=True)), (
        "something was copied"
    )
    return str(error.value)


ARCHITECTURE_OF_LLAMA = Architecture(4, 32, 48, 4, 2, 8, families.VOCAB, 64, norm_eps=1e-5)


def test_names_and_shapes_that_do_not_fit_are_told_at_once(mesh: Mesh) -> None:
    message = problem(
        mesh,
        {
            "model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 32),
            "model.extra": torch.zeros(1),
        },
        qk_norm=True,
    )
    assert (
        "missing (8): model.layers.0.self_attn.q_norm.weight" in message
        and "… and 2 more" in message
    )
    assert "unexpected (1): model.extra" in message
    assert "model.layers.0.self_attn.q_proj.weight is [16, 32], not [32, 32]" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_not_read_as_numbers(dtype: torch.dtype, mesh: Mesh) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    message = problem(mesh, {name: torch.zeros(32, 32).to(dtype)})
    assert f"quantised (1): {name}" in message and "bf16, fp16 or fp32" in message


def test_a_group_head_that_cannot_be_read(mesh: Mesh, tmp_path: Path) -> None:
    file = tmp_path / "group_head.safetensors"
    head = GroupHead(HeadSpec(2, "prompt", detach_trunk=True), 32, mesh, 0)
    save_group_head(tmp_path, head)
    assert load_group_head(tmp_path, head) and saved_group_head(tmp_path) == (2, "prompt")
    whole = file.read_bytes()
    for content in (b"", whole[:40], whole[:-1]):
        file.write_bytes(content)
        for read in (partial(load_group_head, tmp_path, head), partial(saved_group_head, tmp_path)):
            with pytest.raises(UserError, match=r"cannot read group_head\.safetensors") as error:
                read()
            assert error.value.where == str(file)


def test_another_vocabulary_is_a_wrong_shape(mesh: Mesh) -> None:
    message = problem(mesh, {}, vocab_size=300)
    assert (
        "model.embed_tokens.weight is [250, 32], not [300, 32]" in message
        and "lm_head.weight" in message
    )


def test_a_classifier_is_no_language_model(mesh: Mesh) -> None:
    reference = families.hf_model("llama").state_dict()
    state = {k: v for k, v in reference.items() if k != "lm_head.weight"} | {
        "score.weight": torch.zeros(1, 32)
    }
    chunks = build_chunks(ARCHITECTURE_OF_LLAMA, mesh, FP32)
    with pytest.raises(UserError) as error:
        load_hf(state, chunks, mesh, ARCHITECTURE_OF_LLAMA)
    assert "missing (1): lm_head.weight" in str(
        error.value
    ) and "unexpected (1): score.weight" in str(error.value)


def test_folders_that_cannot_be_read(mesh: Mesh, llama: Path, tmp_path: Path) -> None:
    chunks = build_chunks(ARCHITECTURE_OF_LLAMA, mesh, FP32)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors weights here"):
        load_hf(tmp_path, chunks, mesh, ARCHITECTURE_OF_LLAMA)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot read model\.safetensors"):
        load_hf(tmp_path, chunks, mesh, ARCHITECTURE_OF_LLAMA)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    with pytest.raises(UserError, match=r"cannot read model-1\.safetensors"):
        load_hf(tmp_path, chunks, mesh, ARCHITECTURE_OF_LLAMA)


def test_qkv_is_interleaved_by_key_value_group() -> None:
    """By hand: 4 query heads, 2 groups, head size 1: q0 q1 k0 v0 q2 q3 k1 v1."""
    architecture = Architecture(1, 1, 1, 4, 2, 1, 4, 8)
    entry = next(e for e in table(architecture) if e.kind == "qkv")
    parts = [
        torch.tensor([[0.0], [1], [2], [3]]),
        torch.tensor([[10.0], [11]]),
        torch.tensor([[20.0], [21]]),
    ]
    fused = entry.fuse(parts, architecture)
    assert fused.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert all(
        torch.equal(a, b) for a, b in zip(entry.split(fused, architecture), parts, strict=True)
    )


def test_exported_tensors_are_copies(mesh: Mesh, llama: Path) -> None:
    chunks, architecture, _ = loaded(llama, mesh)
    before = [p.detach().clone() for p in chunks[0].parameters()]
    for _, tensor in export_weights(chunks, mesh, architecture):
        tensor.zero_()
    assert all(torch.equal(p, q) for p, q in zip(before, chunks[0].parameters(), strict=True))
