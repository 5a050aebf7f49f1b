"""The functions that a GPU compiles, uncompiled, against Megatron-Core's own path."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.torch_version import TorchVersion

from gipo_megatron.megatron import fusions, model, precision
from gipo_megatron.megatron.fusions import Rotation
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks, rope_frequencies, transformer_config
from gipo_megatron.megatron.roles import MegatronActor
from gipo_megatron.specs import Architecture, Parallel, Precision
from tests.parity import families
from tests.parity.roles import engine
from tests.parity.tiny import ARCHITECTURE, ppo_loss, relative_errors, weighted

pytestmark = pytest.mark.global_rng

ODD = Architecture(
    num_layers=2,
    hidden_size=30,
    ffn_hidden_size=50,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    vocab_size=77,
    max_positions=64,
)
ARCHITECTURES = {
    "grouped": ARCHITECTURE,
    "norms and biases": replace(ARCHITECTURE, qk_norm=True, qkv_bias=True, tied_embeddings=True),
    "scaled": replace(ARCHITECTURE, rope_scaling=families.LLAMA3_ROPE, rope_base=5000.0),
    "odd": ODD,
}


# --------------------------------------------------------------------------------------------- RoPE


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=families.generator(seed)).to(dtype)


def rotated_by_mcore(x: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(len(x)).float(), frequencies)
    config: Any = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
    )
    emb = torch.cat([angles, angles], -1)[:, None, None]
    group: Any = object()  # it has no use for one
    return apply_rotary_pos_emb(x, emb, config, cp_group=group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 8), (3, 1, 6), (5, 5, 14)])
def test_rotation_is_megatrons_bit_for_bit(
    dtype: torch.dtype, heads: int, groups: int, width: int
) -> None:
    """Outputs and gradients; lengths that grow and shrink, with tables kept from one to the next,
    the first from a pass in inference mode; keys that are a view of a fused projection."""
    frequencies = rope_frequencies(replace(ARCHITECTURE, head_dim=width))
    turn, checked = Rotation(frequencies), 0
    with torch.inference_mode():
        turn(random(3, 1, heads, width, dtype=dtype), random(3, 1, groups, width, dtype=dtype))
    for length, batch in ((1, 3), (5, 1), (33, 2), (7, 2)):
        found: list[Tensor] = []
        expected: list[Tensor] = []
        for side in (found, expected):
            q = random(length, batch, heads, width, dtype=dtype).requires_grad_()
            fused = random(length, batch, groups, 3 * width, dtype=dtype, seed=1).requires_grad_()
            k = fused[..., width : 2 * width]
            pair = (
                turn(q, k) if side is found else [rotated_by_mcore(x, frequencies) for x in (q, k)]
            )
            weights = [random(*x.shape, dtype=dtype, seed=2) for x in pair]
            side += [*pair, *torch.autograd.grad(pair, (q, fused), weights)]
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == dtype and torch.equal(mine, theirs), (length, batch)
            checked += 1
    assert checked == 16


def output_and_gradients(
    architecture: Architecture, mesh: Mesh, dtype: str
) -> dict[str, Tensor | None]:
    """Of a model with weights eight times as large as usual, so that all parts count."""
    (chunk,) = build_chunks(architecture, mesh, Precision(dtype), seed=1)
    with torch.no_grad():
        for name, p in chunk.named_parameters():
            if "norm" not in name:
                p.mul_(8)
    tokens = families.tokens(shape=(3, 24)) % architecture.vocab_size
    out = chunk(tokens, None, None)
    out.float().square().mean().backward()
    return {"output": out.detach(), **{name: p.grad for name, p in chunk.named_parameters()}}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_megatrons_bit_for_bit(
    mesh: Mesh, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's outputs and gradients are those of Megatron-Core's RoPE, which each layer computes
    anew."""
    architecture = ARCHITECTURES[name]
    found = output_and_gradients(architecture, mesh, dtype)

    def with_rope(**named: Any) -> GPTModel:
        theirs = GPTModel(**{**named, "position_embedding_type": "rope"})
        theirs.rotary_pos_emb.inv_freq = rope_frequencies(architecture)
        return theirs

    monkeypatch.setattr(model, "GPTModel", with_rope)
    monkeypatch.setattr(fusions, "Rotation", lambda frequencies: lambda q, k: (q, k))
    expected = output_and_gradients(architecture, mesh, dtype)
    assert found.keys() == expected.keys() and len(found) > 10
    trained = 0
    for key, value in expected.items():
        if value is None:  # the chunk returns hidden states: no gradient for the output layer
            assert found[key] is None and key == "output_layer.weight"
            continue
        mine = found[key]
        assert mine is not None and torch.equal(mine, value), key
        trained += bool(value.any())
    assert trained > 10


def test_one_graph_serves_all_shapes() -> None:
    """The compiler needs no break, and no second graph for other widths, batches and heads."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fusions.rotate_uncompiled, backend=count, dynamic=True, fullgraph=True)
    for length, heads, groups, width in (
        (9, 12, 6, 10),
        (17, 8, 4, 10),
        (6, 4, 2, 6),
        (7, 7, 7, 4),
    ):
        q, k = random(length, heads, width), random(length, groups, width, seed=1)
        angles = random(length, 1, width // 2, seed=2)
        arguments = q, k, angles.cos(), angles.sin()
        for mine, expected in zip(
            compiled(*arguments), fusions.rotate_uncompiled(*arguments), strict=True
        ):
            assert torch.equal(mine, expected)
    assert len(graphs) == 1


# --------------------------------------------------------------------------------- weight gradients


@pytest.mark.parametrize(
    ("inputs", "total", "bound"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
)
def test_weight_gradients_are_added(inputs: torch.dtype, total: torch.dtype, bound: float) -> None:
    x, g = random(50, 7, dtype=inputs), random(50, 11, dtype=inputs, seed=1)
    found = random(11, 7, dtype=total, seed=2)
    expected = found.double() + 2 * g.double().t() @ x.double()
    place = found.data_ptr()
    for _ in range(2):
        fusions.add_weight_gradient(x, g, found)
    assert found.dtype == total and found.data_ptr() == place
    assert float((found - expected).norm() / expected.norm()) < bound


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `provide_extension` on a GPU."""
    extension = SimpleNamespace(
        wgrad_gemm_accum_fp32=fusions.add_weight_gradient,
        wgrad_gemm_accum_fp16=fusions.add_weight_gradient,
    )
    monkeypatch.setattr(layers, fusions.EXTENSION, extension, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(fusions, "weight_gradients_fused", lambda: True)


def gradients(mesh: Mesh, **changes: Any) -> tuple[dict[str, Tensor], set[str]]:
    """Of four micro-batches, twice, so that the second pass starts from old sums; and the names of
    weights that are added in a layer's own backward pass."""
    actor = MegatronActor(engine("actor", mesh, **changes), eos_id=1, pad_id=0, decode=str)
    assert (len(weighted().inner), actor.engine.micro_batch) == (8, 2)
    for _ in range(2):
        actor.engine.backward([(weighted(), ppo_loss)], actor.readout)
    (chunk,) = actor.engine.chunks
    added = {name for name, p in chunk.named_parameters() if p.grad_added_to_main_grad}
    return {name: g.float().clone() for name, g in actor.engine.gradients()}, added


@pytest.mark.parametrize(
    ("bound", "changes"),
    [
        (1e-5, {}),
        (1e-5, {"recompute": "full"}),
        (1e-5, {"architecture": replace(ARCHITECTURE, tied_embeddings=True, qkv_bias=True)}),
        (1e-2, {"precision": Precision("bf16")}),
    ],
)
def test_micro_batches_add_up_to_the_same_gradients(
    mesh: Mesh, bound: float, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Linear layers add to the sum themselves; embedding, norms, biases and the output layer's own
    backward pass come through autograd, beside them."""
    expected, none = gradients(mesh, **changes)
    request.getfixturevalue("fused")
    found, added = gradients(mesh, **changes)
    assert not none
    linear = {
        f"decoder.layers.{i}.{name}.weight"
        for i in range(ARCHITECTURE.num_layers)
        for name in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
    }
    # the output layer's, tied or not, if it is one of Megatron-Core's
    assert (
        linear
        <= added
        <= linear
        | {
            "output_layer.weight",
            "embedding.word_embeddings.weight",
        }
    )
    errors = relative_errors(found, expected)
    assert len(errors) > 35 and max(errors.values()) < bound, errors


# ------------------------------------------------------------------------------------------ on, off


def test_a_cpu_has_none_of_it() -> None:
    config = transformer_config(ARCHITECTURE, Parallel(), Precision("bf16"))
    assert not config.gradient_accumulation_fusion and not config.apply_rope_fusion
    assert fusions.rotate is fusions.rotate_uncompiled
    fusions.provide_extension()
    assert fusions.EXTENSION not in sys.modules and not fusions.weight_gradients_fused()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and no extension; what is put in its place is gone after the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, fusions.EXTENSION, ModuleType("unused"))
    del sys.modules[fusions.EXTENSION]


def test_a_gpu_gets_the_extension(gpu: None) -> None:
    for _ in range(2):
        fusions.provide_extension()
    assert fusions.weight_gradients_fused()
    found: Any = sys.modules[fusions.EXTENSION]
    assert found.wgrad_gemm_accum_fp32 is fusions.add_weight_gradient
    assert found.wgrad_gemm_accum_fp16 is fusions.add_weight_gradient


def test_an_installed_extension_stays(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{fusions.EXTENSION}.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    fusions.provide_extension()
    assert fusions.EXTENSION not in sys.modules, "Megatron-Core imports it"


def test_older_torch_adds_in_two_passes(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cu130"))
    fusions.provide_extension()
    assert fusions.EXTENSION not in sys.modules and not fusions.weight_gradients_fused()


@pytest.mark.parametrize(
    ("dtype", "usable", "theirs"),
    [("bf16", True, True), ("bf16", False, False), ("fp32", True, False)],
)
def test_transformer_engines_layers_have_its_rope(
    dtype: str, usable: bool, theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "transformer_engine_usable", lambda: usable)
    monkeypatch.setattr(model, "TransformerConfig", lambda **named: SimpleNamespace(**named))
    config = transformer_config(ARCHITECTURE, Parallel(), Precision(dtype))
    assert config.apply_rope_fusion is theirs
