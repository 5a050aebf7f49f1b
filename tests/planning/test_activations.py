"""Activations of a layer against those that autograd saves; passes in flight against a simulated
schedule."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.planning.activations import (
    Slot,
    forward,
    generation,
    in_flight,
    layer_kept,
    need_of,
    training,
)
from gipo_megatron.specs import LINEARS, AdapterSpec, Architecture, Parallel, Precision, Sampling

LENGTH = 64
BF16, FP32 = 2, 4
NONE = AdapterSpec()


def architecture(layers: int, kv_heads: int, qk_norm: bool = False) -> Architecture:
    return Architecture(
        num_layers=layers,
        hidden_size=128,
        ffn_hidden_size=384,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=32,
        vocab_size=259,
        max_positions=128,
        qk_norm=qk_norm,
    )


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield Mesh.create(Parallel())


def saved(
    mesh: Mesh, a: Architecture, sequences: int, recompute: str, adapter: AdapterSpec = NONE
) -> int:
    """Bytes of the storages that the backward pass of one forward pass needs, weights left out."""
    base = Base() if adapter.rank else None
    precision = Precision("bf16")
    (chunk,) = build_chunks(a, mesh, precision, recompute=recompute, adapter=adapter, base=base)
    chunk.train()
    fixed = (*chunk.parameters(), *chunk.buffers())
    weights = {p.untyped_storage().data_ptr() for p in fixed}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights and t.dtype.is_floating_point:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = chunk(torch.zeros(sequences, LENGTH, dtype=torch.long), None, None)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.global_rng
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("kv_heads", "sequences"), [(2, 1), (4, 3)])
def test_a_layer_keeps_the_tensors_of_autograd(
    mesh: Mesh, recompute: str, kv_heads: int, sequences: int
) -> None:
    """The difference between two layers and one. A CPU's RMSNorm and SwiGLU are composed of parts,
    and keep these parts: two fp32 tensors instead of the norm's input, twice; silu(gate) and up +
    0."""
    per_layer = saved(mesh, architecture(2, kv_heads), sequences, recompute) - saved(
        mesh, architecture(1, kv_heads), sequences, recompute
    )
    a, tokens = architecture(2, kv_heads), sequences * LENGTH
    norms = 0 if recompute == "full" else 2 * tokens * a.hidden_size * (2 * FP32 - BF16)
    swiglu = 2 * tokens * a.ffn_hidden_size * BF16 if recompute == "none" else 0
    assert (
        per_layer
        == layer_kept(Slot(a, Parallel(), BF16, sequences, LENGTH), recompute) + norms + swiglu
    )


@pytest.mark.global_rng
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", [LINEARS, ("q_proj", "v_proj", "down_proj")])
def test_adapters_keep_their_inputs_and_products(
    mesh: Mesh, recompute: str, targets: tuple[str, ...]
) -> None:
    """A frozen norm keeps one fp32 tensor on a CPU. A plan is an upper bound where some layers have
    no adapter, or are computed again."""
    spec = AdapterSpec(rank=3, targets=targets)
    two, one = (saved(mesh, architecture(n, 2), 3, recompute, spec) for n in (2, 1))
    a, tokens = architecture(2, 2), 3 * LENGTH
    norms = 0 if recompute == "full" else 2 * tokens * a.hidden_size * (FP32 - BF16)
    swiglu = 2 * tokens * a.ffn_hidden_size * BF16 if recompute == "none" else 0
    planned = layer_kept(Slot(a, Parallel(), BF16, 3, LENGTH, adapter=spec), recompute)
    assert two - one <= planned + norms + swiglu
    if recompute == "full" or (recompute == "none" and targets == LINEARS):
        assert two - one == planned + norms + swiglu


def test_the_adapters_of_one_layer() -> None:
    """By hand, for two query heads on each key-value head: the fused matrices have 4 + 2 + 2 heads
    of 32, and 2 × 384 rows; A is cut nowhere, B where its layer's rows are."""
    a = architecture(1, 2)
    slot = Slot(a, Parallel(tensor=2), BF16, 1, LENGTH, adapter=AdapterSpec(rank=4))
    assert slot.low == LENGTH * 7 * 4 * BF16
    assert slot.matrices == (256 // 2 * 3 + 128 + 768 // 2 * 2 + 128) * 4 * BF16
    some = AdapterSpec(rank=4, targets=("k_proj", "down_proj"))
    slot = Slot(a, Parallel(), BF16, 1, LENGTH, adapter=some)
    assert (slot.low, slot.matrices) == (LENGTH * 2 * 4 * BF16, (256 + 128) * 4 * BF16)
    without = Slot(a, Parallel(), BF16, 1, LENGTH)
    assert without.low == without.matrices == 0


def test_a_frozen_layer_has_no_gradient() -> None:
    """Of a vocabulary of 4096 over a width of 32 in fp32, 0.5 MiB."""
    a = Architecture(2, 32, 64, 4, 4, 8, 4096, 512)
    slots = [Slot(a, Parallel(), FP32, 1, 512, adapter=AdapterSpec(rank=n)) for n in (0, 2)]
    full, lora = (training(slot, "full", (2,), 0, 1, head=False, moments=0) for slot in slots)
    assert full.logits - lora.logits == 512 * 1024
    matrix, again = 2 * 64 * 32 * FP32, slots[1].low + slots[1].matrices
    assert lora.layer - full.layer == 2 * again - matrix
    assert lora.activations == full.activations


@pytest.mark.global_rng
def test_norms_on_queries_and_keys(mesh: Mesh) -> None:
    """Again a CPU keeps two fp32 tensors of each norm; a GPU its input, which for the keys is there
    anyway."""
    plain, normed = (
        saved(mesh, architecture(2, 2, norm), 2, "none")
        - saved(mesh, architecture(1, 2, norm), 2, "none")
        for norm in (False, True)
    )
    slots = [Slot(architecture(2, 2, norm), Parallel(), BF16, 2, LENGTH) for norm in (False, True)]
    query, key = slots[0].query, slots[0].key
    assert (
        layer_kept(slots[1], "none") - layer_kept(slots[0], "none")
        == normed - plain - 2 * FP32 // BF16 * (query + key) + query
    )


def test_tensor_and_sequence_parallel_divide() -> None:
    """Llama-2 7B, one sequence of 2048, tensor 4, by hand: norms 4 · 16 MiB / 4, attention 5 · 16 /
    4 + 16 / 4, feed-forward 3 · 43 / 4."""
    a = Architecture(32, 4096, 11008, 32, 32, 128, 32000, 4096)
    mib = 2**20
    statistics = 2 * 2048 * 4
    whole = layer_kept(Slot(a, Parallel(tensor=4), BF16, 1, 2048), "none")
    shared = layer_kept(Slot(a, Parallel(tensor=4, sequence=True), BF16, 1, 2048), "none")
    split = (6 * 16 + 3 * 43) * mib // 4 + 2048 * 32 * 4 // 4
    assert whole == 4 * 16 * mib + split + statistics
    assert shared == 16 * mib + split + statistics // 4
    assert layer_kept(Slot(a, Parallel(tensor=4, sequence=True), BF16, 1, 2048), "full") == 4 * mib


def most_in_flight(stages: int, stage: int, slots: int) -> int:
    """1F1B, slot by slot: warm-up, then a forward and a backward in turn."""
    warm_up = min(stages - stage - 1, slots)
    order = ["F"] * warm_up + ["F", "B"] * (slots - warm_up) + ["B"] * warm_up
    counts = [order[: i + 1].count("F") - order[: i + 1].count("B") for i in range(len(order))]
    return max(counts)


def test_passes_in_flight() -> None:
    checked = 0
    for stages in (1, 2, 4, 8):
        for stage in range(stages):
            for slots in (1, 3, 8, 20):
                assert in_flight(Parallel(pipeline=stages), stage, slots) == most_in_flight(
                    stages, stage, slots
                )
                checked += 1
    assert checked == 60
    # Narayanan et al. 2021: 2 (p - 1 - r) + (v - 1) p warm-up passes, and one
    interleaved = Parallel(pipeline=4, virtual_pipeline=2)
    assert [in_flight(interleaved, stage, 16) for stage in range(4)] == [11, 9, 7, 5]
    assert in_flight(interleaved, 0, 4) == 8


def test_generation() -> None:
    """Llama-2 7B, tensor 4: 32 layers · 2 · 8 heads · 128 · 2 bytes = 128 KiB a token. Five prompts
    of 1536 tokens are a block."""
    slot = Slot(
        Architecture(32, 4096, 11008, 32, 32, 128, 32000, 4096),
        Parallel(tensor=4, sequence=True),
        BF16,
        4,
        2048,
    )
    assert need_of(slot).token == 128 * 1024
    found = generation(slot, 16, 2048, Sampling(512), 0)
    assert found.cache == 16 * 2047 * 128 * 1024 and found.rows == 16
    assert found.layer == 5 * 1536 * 2 * (3 * 4096 + 3 * (1024 + 1024 + 2752))
    # gathered, joined, fp32, exponentials, sums in fp64
    assert found.logits == 16 * 32000 * (2 + 2 + 4 + 4 + 8)
    many = generation(slot, 1000, 2048, Sampling(512), 0)
    assert many.layer == many.cache // 64, (
        "a tensor of the cache is copied while finished rows leave it"
    )


def test_the_readout_works_in_the_devices_blocks() -> None:
    """A vocabulary of 128256 over one rank, one sequence of 8192: 4008 MiB of logits in fp32, of
    which two blocks are there at once. The weight's gradient is 1002 MiB, that of the rows in fp32
    128 MiB."""
    a = Architecture(32, 4096, 14336, 32, 8, 128, 128256, 8192)
    cpu, cuda = (Slot(a, Parallel(), BF16, 1, 8192, torch.device(d)) for d in ("cpu", "cuda"))
    found = [forward(slot, 0, head=False).logits for slot in (cpu, cuda)]
    assert found[1] - found[0] == 2 * (512 - 8) * 2**20
    trained = training(cuda, "none", (32,), 0, 1, head=False, moments=0).logits
    assert trained - found[1] == (1002 + 128) * 2**20


def test_a_block_that_is_all_is_kept() -> None:
    """512 rows of 4096 logits: 8 MiB. Beside it the gradients of a weight of 0.5 MiB, and of rows
    of 64 KiB."""
    a = Architecture(2, 32, 64, 4, 4, 8, 4096, 512)
    slot = Slot(a, Parallel(), FP32, 1, 512, torch.device("cpu"))
    kept = training(slot, "none", (2,), 0, 1, head=False, moments=0).logits
    assert kept - forward(slot, 0, head=False).logits == (8 * 1024 + 512 + 64) * 1024
