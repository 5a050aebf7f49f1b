"""The decoder's steps against mcore's training forward, and its reading of weights."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from gipo_megatron.megatron.decode import Decoder, Linear, layer_weights, rms_norm
from gipo_megatron.megatron.heads import all_logits
from gipo_megatron.megatron.kv_budget import Need
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.specs import AdapterSpec, Architecture, Parallel, Precision
from tests.parity import families
from tests.parity.tiny import ARCHITECTURE

VARIANTS = {
    "grouped": ARCHITECTURE,
    "qkv_bias": replace(ARCHITECTURE, qkv_bias=True),
    "qk_norm": replace(ARCHITECTURE, qk_norm=True, head_dim=16),
    "tied": replace(ARCHITECTURE, tied_embeddings=True),
    "one_group": replace(ARCHITECTURE, num_kv_heads=1),
    "all_groups": replace(ARCHITECTURE, num_kv_heads=4),
}
LENGTHS = torch.tensor([5, 8, 1, 8])
STEPS = 6


def model(
    architecture: Architecture,
    mesh: Mesh,
    dtype: str = "fp32",
    adapter: AdapterSpec = AdapterSpec(),
) -> list[nn.Module]:
    chunks = build_chunks(architecture, mesh, Precision(dtype), adapter=adapter, seed=3)
    g = families.generator(8)
    for p in chunks[0].parameters():  # biases and norms too
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.2 + (1.0 if p.ndim == 1 else 0.0))
    return list(chunks)


def stepwise(
    chunks: list[nn.Module], architecture: Architecture, mesh: Mesh, tokens: Tensor, lengths: Tensor
) -> list[Tensor]:
    """Logits of every row's tokens lengths - 1 … lengths + STEPS - 2, teacher-forced: prefill, then
    one step a token."""
    width = int(lengths.max())
    decoder = Decoder(chunks, architecture, mesh, tokens.shape[1])
    cache = decoder.allocate(len(tokens), width + STEPS)
    for x in (*cache.keys, *cache.values):
        x.fill_(50.0)  # what masked slots hold has no influence
    prompt = torch.where(torch.arange(width) < lengths[:, None], tokens[:, :width], 0)
    first = (
        decoder.prefill(prompt[:3], lengths[:3], cache, 0),
        decoder.prefill(prompt[3:], lengths[3:], cache, 3),
    )
    out: list[Tensor] = [torch.cat([x for x in first if x is not None])]
    for t in range(STEPS - 1):
        at = lengths + t
        slots = width + t + 1 if t % 2 else width + STEPS  # as few as needed, or all
        logits = decoder.step(tokens.gather(1, at[:, None])[:, 0], at, cache, slots)
        assert logits is not None
        out.append(logits)
    return out


@pytest.mark.parametrize(
    ("name", "rank"), [*((name, 0) for name in VARIANTS), ("grouped", 3), ("qkv_bias", 3)]
)
def test_steps_give_the_training_forwards_logits(mesh: Mesh, name: str, rank: int) -> None:
    architecture = VARIANTS[name]
    chunks = model(architecture, mesh, adapter=AdapterSpec(rank, alpha=6.0))
    tokens = families.tokens(shape=(4, 8 + STEPS))
    with torch.no_grad():
        expected = all_logits(chunks[0], chunks[0](tokens, None, None))[
            ..., : architecture.vocab_size
        ]
        found = stepwise(chunks, architecture, mesh, tokens, LENGTHS)
        equal = stepwise(chunks, architecture, mesh, tokens, torch.full((4,), 8))
    for t in range(STEPS):
        torch.testing.assert_close(
            found[t], expected[torch.arange(4), LENGTHS - 1 + t], atol=2e-5, rtol=1e-5
        )
        torch.testing.assert_close(equal[t], expected[:, 7 + t], atol=2e-5, rtol=1e-5)
    assert len(found) == len(equal) == STEPS


def test_bf16_stays_near_the_training_forward(mesh: Mesh) -> None:
    chunks = model(ARCHITECTURE, mesh, "bf16")
    tokens = families.tokens(shape=(4, 8 + STEPS))
    with torch.no_grad():
        expected = all_logits(chunks[0], chunks[0](tokens, None, None))[
            ..., : ARCHITECTURE.vocab_size
        ].float()
        found = torch.stack(stepwise(chunks, ARCHITECTURE, mesh, tokens, LENGTHS)).float()
    assert found.dtype == torch.float32 and found.isfinite().all()
    picked = torch.stack([expected[torch.arange(4), LENGTHS - 1 + t] for t in range(STEPS)])
    assert float((found - picked).norm() / picked.norm()) < 2e-2


def test_a_step_of_the_first_rows_leaves_the_others_untouched(mesh: Mesh) -> None:
    chunks = model(ARCHITECTURE, mesh)
    tokens, width = families.tokens(shape=(4, 12)), int(LENGTHS.max())
    decoder = Decoder(chunks, ARCHITECTURE, mesh, 20)
    with torch.no_grad():
        cache = decoder.allocate(4, width + 2)
        decoder.prefill(tokens[:, :width], LENGTHS, cache, 0)
        rest = [x[2:].clone() for x in (*cache.keys, *cache.values)]
        part = decoder.step(tokens[:2, 8], LENGTHS[:2], cache, width + 1)
        assert all(
            torch.equal(x[2:], y) for x, y in zip((*cache.keys, *cache.values), rest, strict=True)
        )
        whole = decoder.step(tokens[:, 8], LENGTHS, cache, width + 1)
    assert whole is not None and part is not None
    torch.testing.assert_close(part, whole[:2], atol=1e-5, rtol=1e-5)


class _Fused(nn.Module):
    """A layer with the parameter names of Transformer Engine's spec, which holds the norms in the
    linear layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.self_attention = layer.self_attention
        self.mlp = layer.mlp
        self.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
        self.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight


def test_weights_by_transformer_engines_names(mesh: Mesh) -> None:
    architecture, checked = replace(ARCHITECTURE, qkv_bias=True, qk_norm=True), 0
    for layer in model(architecture, mesh)[0].decoder.layers:
        local = layer_weights(layer, architecture)
        fused = layer_weights(_Fused(layer), architecture)
        for f in fields(local):
            found, same = getattr(local, f.name), getattr(fused, f.name)
            if isinstance(found, Linear):
                found, same = found.weight, same.weight
            assert found.data_ptr() == same.data_ptr(), f.name
            checked += 1
        assert local.qkv.bias is not None and local.qkv.a is local.fc1.bias is None
    assert checked == 4 * 8


def test_missing_weight_is_named(mesh: Mesh) -> None:
    layer = model(ARCHITECTURE, mesh)[0].decoder.layers[0]
    with pytest.raises(
        ValueError, match=r"no parameter self_attention\.linear_qkv\.bias in a layer with"
    ):
        layer_weights(layer, replace(ARCHITECTURE, qkv_bias=True))


def test_rms_norm_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])  # mean square 12.5
    torch.testing.assert_close(
        rms_norm(x, torch.tensor([2.0, 1.0]), 0.0), torch.tensor([[6.0, 4.0]]) / 12.5**0.5
    )


def test_cache_bytes(mesh: Mesh) -> None:
    decoder = Decoder(model(ARCHITECTURE, mesh), ARCHITECTURE, mesh, 8)
    cache = decoder.allocate(3, 10)
    held = sum(x.nbytes for x in cache.keys + cache.values)
    assert held == 3 * 10 * Need(ARCHITECTURE, Parallel(), 4).token == 3 * 10 * 2 * 4 * 2 * 8 * 4
    assert cache.rows.tolist() == [0, 1, 2] and cache.slots.tolist() == list(range(10))
