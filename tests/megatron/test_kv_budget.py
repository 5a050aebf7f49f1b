"""How many rows generate at once: bytes by hand and as torch allocates them, GPUs by injected free
memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gipo_megatron.megatron import generate as generation
from gipo_megatron.megatron import kv_budget
from gipo_megatron.megatron.decode import Decoder
from gipo_megatron.megatron.kv_budget import HOST_ROOM, Need, Room, find_room, room_in
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.megatron.sampling import pick, pick_bytes
from gipo_megatron.specs import Architecture, Parallel, Precision, Sampling
from gipo_megatron.types import Prompts
from tests.parity.generation_cases import GREEDY, NEVER, STEPS, load, prompts, responses, spell
from tests.watch import LiveBytes

GIB = 2**30
SEVEN_B = Need(Architecture(32, 4096, 11008, 32, 32, 128, 32000, 4096), Parallel(tensor=4), 2)
PLAIN = Sampling(512)


def test_a_gpus_room_by_hand() -> None:
    """5 % of 80 GiB and 8192 prompt tokens (26688 elements each) stay free; of 64 tensors of cache
    one more; 20 bytes a logit."""
    assert SEVEN_B.token == 2 * 32 * 8 * 128 * 2
    spare = 36 * GIB - 4 * GIB - 8192 * 2 * (3 * 4096 + 3 * (1024 + 1024 + 2752))
    assert room_in(36 * GIB, 80 * GIB, SEVEN_B, 1536, PLAIN) == Room(spare * 64 // 65, 32000 * 20)
    assert room_in(36 * GIB, 80 * GIB, SEVEN_B, 8193, PLAIN).size < spare * 64 // 65, (
        "one prompt may be longer than a block"
    )
    assert room_in(4 * GIB, 80 * GIB, SEVEN_B, 1536, PLAIN).size == 0
    alone = replace(SEVEN_B, parallel=Parallel())  # has CUDA graphs
    assert room_in(36 * GIB, 80 * GIB, alone, 1536, PLAIN).row == 2 * 32000 * 20


def test_rows_pay_for_their_cache_and_their_logits() -> None:
    assert Room(1000, row=20).rows(slots=10, token=8) == 10
    assert Room(999, row=20).rows(slots=10, token=8) == 9
    assert Room(0, row=20).rows(slots=10, token=8) == 1, "one at least"
    assert HOST_ROOM.rows(slots=2048, token=SEVEN_B.token) == 16


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [(128, 344, 8, 8, 16), (128, 448, 8, 2, 16), (128, 128, 8, 8, 32)],
    ids=["equal", "grouped", "wide"],
)
def test_prefill_is_what_the_decoder_holds(
    mesh: Mesh, shape: tuple[int, int, int, int, int], dtype: str
) -> None:
    a = Architecture(2, *shape, vocab_size=64, max_positions=128)
    lengths = torch.full((4,), 64)
    with torch.inference_mode():
        decoder = Decoder(build_chunks(a, mesh, Precision(dtype), seed=1), a, mesh, 66)
        cache = decoder.allocate(4, 65)
        with LiveBytes() as live:
            decoder.prefill(torch.zeros(4, 64, dtype=torch.long), lengths, cache, 0)
    assert 0.75 < live.peak / Need(a, Parallel(), decoder.dtype.itemsize).prefill(4 * 64) < 1.01


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1),
        Sampling(1, temperature=0.7),
        Sampling(1, temperature=0.0),
        Sampling(1, top_k=50),
        Sampling(1, temperature=0.7, top_p=0.9),
        Sampling(1, temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.2),
        Sampling(1, temperature=0.0, repetition_penalty=1.2),
    ],
)
def test_drawing_a_token_needs_no_more_than_is_planned(sampling: Sampling) -> None:
    """A GPU's sort takes some more than a CPU's: a third of the larger figure is left for it."""
    g = torch.Generator().manual_seed(0)
    logits, uniform, seen = (
        torch.randn(4, 5000, generator=g).bfloat16(),
        torch.rand(4, dtype=torch.float64, generator=g),
        None,
    )
    if sampling.repetition_penalty != 1:
        seen = torch.rand(4, 5000, generator=g) > 0.5
    with LiveBytes() as live:
        pick(logits, sampling, uniform, seen)
    planned = 4 * 5000 * pick_bytes(sampling)
    assert live.peak <= (planned + 1000 if pick_bytes(sampling) == 16 else planned * 3 / 4)


def test_free_memory_is_also_what_the_allocator_holds_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, answer in (
        ("mem_get_info", (10, 100)),
        ("memory_reserved", 50),
        ("memory_allocated", 20),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert kv_budget.free_memory(torch.device("cuda", 1)) == (10 + 50 - 20, 100)
    assert kv_budget.free_memory(torch.device("cpu")) is None


def test_on_a_cpu_the_room_is_fixed(mesh: Mesh) -> None:
    assert find_room(mesh, SEVEN_B, 1536, PLAIN) is HOST_ROOM and Room(4 * GIB, row=0) == HOST_ROOM


def test_generation_takes_the_free_memory(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free bytes for two rows of the longest prompts: three slices of six rows, and the same
    responses."""
    chunks, architecture = load("llama", mesh)
    rows, sizes = prompts("equal"), []
    need = Need(architecture, Parallel(), 4)
    row = (7 + STEPS) * need.token + 2 * need.logits(GREEDY)
    spare = 2.5 * row * (2 * need.layers + 1) / (2 * need.layers)
    respond = generation.respond

    def spy(decoder: Decoder, sampling: Sampling, ends: Tensor, part: Prompts) -> Any:
        sizes.append(len(part))
        return respond(decoder, sampling, ends, part)

    monkeypatch.setattr(generation, "respond", spy)
    arguments = (chunks, architecture, mesh, rows, GREEDY, NEVER, 0, spell)
    whole = responses(generation.generate(*arguments))
    monkeypatch.setattr(
        kv_budget,
        "free_memory",
        lambda device: (int(need.prefill(8192) + 0.05 * 10**9 + spare), 10**9),
    )
    assert responses(generation.generate(*arguments)) == whole
    assert sizes == [6, 2, 2, 2]
    monkeypatch.setattr(kv_budget, "free_memory", lambda device: (0, 10**9))
    assert len(generation.generate(*arguments)) == 6 and sizes[4:] == [1] * 6


def test_a_stage_counts_the_layers_of_the_fullest(mesh: Mesh) -> None:
    staged = replace(
        SEVEN_B,
        architecture=replace(SEVEN_B.architecture, num_layers=30),
        parallel=Parallel(tensor=4, pipeline=4),
    )
    assert staged.layers == 8 and staged.token == SEVEN_B.token // 4
