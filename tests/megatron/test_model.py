from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import model, precision
from gipo_megatron.megatron.fusions import Rotation
from gipo_megatron.megatron.hf import export_weights
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import (
    CausalAttention,
    RMSNorm,
    build_chunks,
    check_split,
    generator_for,
    padded_vocab,
    rope_frequencies,
    transformer_config,
)
from gipo_megatron.specs import Parallel, Precision
from gipo_megatron.weights.hf_config import architecture_from_config
from tests.parity import families
from tests.parity.tiny import ARCHITECTURE

FP32 = Precision("fp32")


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (Parallel(tensor=3), "4 does not divide by tensor 3"),
        (Parallel(tensor=4), "2 does not divide by tensor 4"),
        (Parallel(pipeline=3), "4 does not divide by pipeline 3 × virtual_pipeline 1"),
        (
            Parallel(pipeline=2, virtual_pipeline=4),
            "4 does not divide by pipeline 2 × virtual_pipeline 4",
        ),
    ],
)
def test_what_does_not_divide_is_named(parallel: Parallel, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_split(ARCHITECTURE, parallel)
    check_split(ARCHITECTURE, Parallel(tensor=2, pipeline=2, virtual_pipeline=2))


@pytest.mark.parametrize(
    ("vocab", "tensor", "rows"),
    [(250, 1, 256), (250, 2, 256), (256, 8, 256), (257, 1, 320), (250, 3, 384)],
)
def test_padded_vocabulary(vocab: int, tensor: int, rows: int) -> None:
    assert padded_vocab(replace(ARCHITECTURE, vocab_size=vocab), tensor) == rows


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_rope_frequencies_are_hugging_faces(scaling: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters={"rope_theta": 500000.0, **scaling}
    )
    expected = LlamaRotaryEmbedding(config).inv_freq
    block = None if scaling["rope_type"] == "default" else scaling
    mine = rope_frequencies(
        replace(ARCHITECTURE, head_dim=128, rope_base=500000.0, rope_scaling=block)
    )
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0)


def test_other_rope_scaling_is_refused() -> None:
    with pytest.raises(UserError, match="RoPE scaling 'yarn' is not supported"):
        check_split(
            replace(ARCHITECTURE, rope_scaling={"rope_type": "yarn", "factor": 2.0}), Parallel()
        )


def gradients(mesh: Mesh, recompute: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    chunk = build_chunks(ARCHITECTURE, mesh, FP32, recompute=recompute, seed=1)[0]
    out = chunk(families.tokens(), None, None)
    out.square().sum().backward()
    return out.detach(), {n: p.grad for n, p in chunk.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(mesh: Mesh, recompute: str) -> None:
    (plain, expected), (out, found) = gradients(mesh, "none"), gradients(mesh, recompute)
    torch.testing.assert_close(out, plain)
    assert found.keys() == expected.keys() and len(found) > 20
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_unknown_recompute_is_told(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="unknown recompute 'some'"):
        build_chunks(ARCHITECTURE, mesh, FP32, recompute="some")


def test_initial_weights(mesh: Mesh) -> None:
    """Standard deviations by name; two seeds differ; padding rows are zero."""
    big = replace(
        ARCHITECTURE, hidden_size=128, ffn_hidden_size=256, head_dim=32, qkv_bias=True, qk_norm=True
    )
    chunk = build_chunks(big, mesh, FP32, seed=1)[0]
    stds = {
        "linear_qkv.weight": 0.02,
        "linear_fc1.weight": 0.02,
        "linear_proj.weight": 0.02 / math.sqrt(8),
        "linear_fc2.weight": 0.02 / math.sqrt(8),
    }
    checked = 0
    for name, p in chunk.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name:
            assert bool((p == 1).all())
        else:
            real = p[: big.vocab_size] if name.startswith(("embedding", "output")) else p
            expected = next((std for suffix, std in stds.items() if name.endswith(suffix)), 0.02)
            assert float(real.detach().std()) == pytest.approx(expected, rel=0.03), name
        checked += 1
    assert checked == 4 * 9 + 3
    assert not chunk.output_layer.weight[big.vocab_size :].any()
    other = build_chunks(big, mesh, FP32, seed=2)[0]
    assert not torch.equal(other.output_layer.weight, chunk.output_layer.weight)


def test_generators_depend_on_seed_and_name_only() -> None:
    draws = {
        (s, n): float(torch.rand(1, generator=generator_for(s, n)))
        for s in (0, 1)
        for n in ("a", "b")
    }
    assert len(set(draws.values())) == 4
    assert draws[0, "a"] == float(torch.rand(1, generator=generator_for(0, "a")))


@pytest.mark.parametrize(
    ("dtype", "usable", "theirs"),
    [("bf16", True, True), ("bf16", False, False), ("fp32", True, False)],
)
def test_whose_layers(
    mesh: Mesh, dtype: str, usable: bool, theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's in bf16 alone: it multiplies fp32 matrices in TF32. The final norm goes
    with the layers."""
    config = transformer_config(replace(ARCHITECTURE, qk_norm=True), Parallel(), Precision(dtype))
    layer = ModuleSpec(module=object)
    monkeypatch.setattr(precision, "transformer_engine_usable", lambda: usable)
    monkeypatch.setattr(model, "get_gpt_layer_with_transformer_engine_spec", lambda **named: layer)
    block = model._block_spec(config, None, torch.ones(4))
    assert len(block.layer_specs) == 4
    assert block.layer_norm is (TENorm if theirs else RMSNorm)
    assert all((found is layer) == theirs for found in block.layer_specs)
    if not theirs:
        parts = block.layer_specs[0].submodules
        attention = parts.self_attention.submodules
        assert (
            parts.input_layernorm
            is parts.pre_mlp_layernorm
            is attention.q_layernorm.module
            is RMSNorm
        )
        assert attention.core_attention.module is CausalAttention


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_attention_returns_the_strides_of_a_contiguous_tensor(
    mesh: Mesh, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order SDPA's [b, heads, s, d] lies in memory, d last. With b = 1 its stride is
    free, and torch 2.11 would multiply a tensor [s, 1, h] with an uncommon one by a weight as s
    products of one row each (pytorch issue 186148).
    """
    shape = (1, 4, 6, 8)
    _, heads, s, d = shape
    strides = [0, 0, 0, 1]
    for i, axis in enumerate(order):
        strides[axis] = d * math.prod(shape[other] for other in order[i + 1 :])
    checked = 0
    for strides[0] in (1, d, heads * d, s * heads * d):
        out = torch.arange(float(s * heads * d)).as_strided(shape, strides)
        monkeypatch.setattr(
            model.F, "scaled_dot_product_attention", lambda *args, out=out, **named: out
        )
        x = torch.zeros(s, 1, heads, d)
        found = CausalAttention(
            transformer_config(ARCHITECTURE, Parallel(), FP32),
            1,
            AttnMaskType.causal,
            "self",
            rotation=Rotation(torch.ones(d // 2)),
        )(x, x, x, None)
        assert found.stride() == (heads * d, heads * d, 1)
        assert all(
            torch.equal(found[i, 0, j * d : (j + 1) * d], out[0, j, i])
            for i in range(s)
            for j in range(heads)
        )
        checked += 1
    assert checked == 4


@pytest.mark.multiprocess
def test_initial_weights_are_the_same_at_every_layout(
    mesh: Mesh, model_cells: list[dict[str, Any]]
) -> None:
    """Hash of all whole tensors: one process here, every layout of two there."""
    checked = 0
    for name, head in (("llama", None), ("qwen3", None), ("qwen2", "value")):
        architecture = architecture_from_config(families.hf_model(name).config.to_dict(), name)
        chunks = build_chunks(architecture, mesh, FP32, head=head, seed=7)
        expected = families.digest(export_weights(chunks, mesh, architecture, head=head))
        for layout in families.LAYOUTS:
            assert {cells[f"{layout}/{name}/weights"] for cells in model_cells} == {expected}, (
                layout,
                name,
            )
            checked += 1
    assert checked == 12
