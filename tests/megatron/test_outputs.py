from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gipo_megatron.megatron import outputs
from gipo_megatron.megatron.heads import GroupHead
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.outputs import critic_output, last_token_score, response_positions
from gipo_megatron.planning.activations import READOUT_COPIES
from gipo_megatron.specs import HeadSpec
from gipo_megatron.types import Sequences, TokenStats
from tests.parity.outputs_reference import ReadoutCase, plain_token_stats
from tests.watch import LiveBytes


def token_stats(logits: Tensor, sequences: Sequences, **arguments: Any) -> TokenStats:
    return outputs.token_stats(logits, sequences, response_positions(sequences.mask), **arguments)


@pytest.mark.parametrize("chunk_bytes", [1, 4096, 8 << 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_float64_autograd(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, temperature: float
) -> None:
    # 1 row, 4 rows, all rows at a time
    monkeypatch.setitem(outputs.CHUNK_BYTES, "cpu", chunk_bytes)
    case = ReadoutCase.make()
    logits = case.logits.clone().requires_grad_()
    stats = token_stats(
        logits,
        case.sequences,
        vocab_size=case.vocab,
        mesh=mesh,
        temperature=temperature,
        entropy=True,
    )
    assert stats.entropy is not None
    ((stats.logprobs * case.weights[0]).sum() + (stats.entropy * case.weights[1]).sum()).backward()
    logprobs, entropy, gradient = plain_token_stats(case, temperature)
    torch.testing.assert_close(stats.logprobs.double(), logprobs, atol=3e-6, rtol=0)
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=3e-6, rtol=0)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), gradient, atol=2e-6, rtol=0)
    assert torch.equal(logits.detach(), case.logits), "the logits were changed"
    assert not logits.grad[:, :, case.vocab :].any()
    assert not stats.logprobs[~case.sequences.mask].any()


def test_without_entropy(mesh: Mesh) -> None:
    case = ReadoutCase.make()
    one, two = (case.logits.clone().requires_grad_() for _ in range(2))
    plain = token_stats(one, case.sequences, vocab_size=case.vocab, mesh=mesh)
    both = token_stats(two, case.sequences, vocab_size=case.vocab, mesh=mesh, entropy=True)
    assert plain.entropy is None and torch.equal(plain.logprobs, both.logprobs)
    plain.logprobs.sum().backward()
    both.logprobs.sum().backward()
    torch.testing.assert_close(one.grad, two.grad, atol=1e-7, rtol=0)


def test_bf16_logits_are_summed_in_fp32(mesh: Mesh) -> None:
    case = ReadoutCase.make()
    logits = case.logits.bfloat16().requires_grad_()
    stats = token_stats(logits, case.sequences, vocab_size=case.vocab, mesh=mesh)
    expected, _, _ = plain_token_stats(replace(case, logits=case.logits.bfloat16()), 1.0)
    assert stats.logprobs.dtype == torch.float32
    torch.testing.assert_close(stats.logprobs.double(), expected, atol=3e-6, rtol=0)
    stats.logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_an_empty_mask_gives_zeros_that_can_be_differentiated(mesh: Mesh) -> None:
    case = ReadoutCase.make()
    sequences = replace(case.sequences, mask=torch.zeros_like(case.sequences.mask))
    logits = case.logits.clone().requires_grad_()
    stats = token_stats(logits, sequences, vocab_size=case.vocab, mesh=mesh, entropy=True)
    stats.logprobs.sum().backward()
    assert not stats.logprobs.any() and logits.grad is not None and not logits.grad.any()


def test_a_first_token_inside_the_mask_is_refused(mesh: Mesh) -> None:
    case = ReadoutCase.make()
    mask = case.sequences.mask.clone()
    mask[0, 0] = True
    with pytest.raises(AssertionError, match="nothing predicts it"):
        response_positions(mask)


def test_nothing_is_read_back_from_the_device(mesh: Mesh) -> None:
    """Meta tensors have no values: code that reads one fails here, and on a GPU it would wait."""
    case = ReadoutCase.make()
    places = response_positions(case.sequences.mask)
    there = case.sequences.to("meta")
    logits = torch.empty(case.logits.shape, device="meta", requires_grad=True)
    stats = outputs.token_stats(
        logits, there, places.to("meta"), vocab_size=case.vocab, mesh=mesh, entropy=True
    )
    assert (
        stats.entropy is not None
        and stats.logprobs.shape == stats.entropy.shape == case.sequences.mask.shape
    )
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert logits.grad is not None and logits.grad.is_meta
    raw = torch.empty(*case.logits.shape[:2], 1, device="meta")
    assert (
        critic_output(raw, raw.transpose(0, 1), there, None).values.is_meta
        and last_token_score(raw, there).is_meta
    )


@pytest.mark.parametrize(
    ("device", "vocabulary", "rows"),
    [("cpu", 32000, 65), ("cpu", 128256, 16), ("cuda", 32000, 4194), ("cuda", 128256, 1046)],
)
def test_rows_of_a_chunk(mesh: Mesh, device: str, vocabulary: int, rows: int) -> None:
    """8 MiB, or 512 MiB, over 4 bytes a column."""
    assert (
        outputs._VocabShard(vocabulary, vocabulary, mesh).rows_per_chunk(torch.device(device))
        == rows
    )


class Operations(TorchDispatchMode):
    """Names of the operations that put out a matrix as wide as the vocabulary."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.names = columns, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[-1:] == (self.columns,):
            self.names.append(str(func))
        return out


def test_an_entropy_outside_the_loss_costs_nothing_in_the_backward_pass(mesh: Mesh) -> None:
    case = ReadoutCase.make()
    seen = {}
    for name, entropy in (("none", False), ("reported", True), ("used", True)):
        logits = case.logits.clone().requires_grad_()
        stats = token_stats(
            logits, case.sequences, vocab_size=case.vocab, mesh=mesh, entropy=entropy
        )
        total = stats.logprobs.sum()
        if name == "used":
            assert stats.entropy is not None
            total = total + 0.01 * stats.entropy.sum()
        with Operations(case.logits.shape[-1]) as watch:
            total.backward()
        seen[name] = watch.names, logits.grad
    assert len(seen["none"][0]) > 3 and seen["none"][0] == seen["reported"][0] != seen["used"][0]
    assert torch.equal(seen["none"][1], seen["reported"][1]) and not torch.equal(
        seen["none"][1], seen["used"][1]
    )


class LargestFp32(TorchDispatchMode):
    """The most fp32 elements that any operation put out."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return out


def test_nothing_of_the_size_of_the_logits_is_made_in_fp32(mesh: Mesh) -> None:
    """A 32k vocabulary, 4 x 128 positions: 16.4 M logits, never more than 8 MiB of fp32 (2.1 M) in
    one tensor, backward included."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 128, 32000, generator=g, dtype=torch.bfloat16).requires_grad_()
    mask = torch.ones(4, 128, dtype=torch.bool)
    mask[:, 0] = False
    sequences = Sequences(
        torch.randint(0, 32000, (4, 128), generator=g),
        mask,
        torch.ones(4).long(),
        torch.full((4,), 128),
        torch.arange(4),
    )
    with LargestFp32() as watch:
        stats = token_stats(logits, sequences, vocab_size=32000, mesh=mesh, entropy=True)
        assert stats.entropy is not None
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert 0 < watch.elements <= outputs.CHUNK_BYTES["cpu"] // 4


def test_three_chunks_are_held_at_once(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's figure (activations.READOUT_COPIES), forward and backward; beside them the
    gradient in the logits' dtype."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 257, 4096, generator=g).bfloat16().requires_grad_()
    mask = torch.ones(1, 257, dtype=torch.bool)
    mask[:, 0] = False
    chunk = 64 * 4096 * 4
    monkeypatch.setitem(outputs.CHUNK_BYTES, "cpu", chunk)
    tokens = torch.randint(0, 4000, (1, 257), generator=g)
    sequences = Sequences(tokens, mask, torch.ones(1).long(), torch.tensor([257]), torch.arange(1))
    with LiveBytes() as forward:
        stats = token_stats(logits, sequences, vocab_size=4000, mesh=mesh, entropy=True)
    assert stats.entropy is not None
    total = (stats.logprobs + stats.entropy).sum()
    with LiveBytes() as backward:
        total.backward()
    small = 0.1 * chunk  # a few numbers a row
    assert 2 * chunk < forward.peak < READOUT_COPIES * chunk + small
    assert 2 * chunk < backward.peak - logits.nbytes < READOUT_COPIES * chunk + small


@pytest.mark.multiprocess
def test_token_stats_with_a_split_vocabulary(model_cells: list[dict[str, Any]]) -> None:
    limits = {
        "token_stats/logprobs": 3e-6,
        "token_stats/entropy": 3e-6,
        "token_stats/gradient": 2e-6,
    }
    checked = [cells[name] < limit for cells in model_cells for name, limit in limits.items()]
    assert all(checked) and len(checked) == 6, model_cells


def by_hand() -> Sequences:
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    return Sequences(
        torch.zeros(2, 5, dtype=torch.long),
        mask,
        torch.tensor([2, 1]),
        torch.tensor([4, 5]),
        torch.arange(2),
    )


def test_values_are_of_the_state_in_which_the_token_was_chosen(mesh: Mesh) -> None:
    raw = torch.tensor([[10.0, 11, 12, 13, 14], [20, 21, 22, 23, 24]])[..., None]
    out = critic_output(raw, torch.zeros(5, 2, 4), by_hand(), None)
    assert out.values.tolist() == [[0, 0, 11, 12, 0], [0, 20, 21, 22, 23]]
    assert out.group_logits is None
    assert last_token_score(raw, by_hand()).tolist() == [13, 24]


@pytest.mark.parametrize(("where", "positions"), [("prompt", [1, 0]), ("trajectory", [3, 4])])
def test_group_logits_read_one_token(mesh: Mesh, where: str, positions: list[int]) -> None:
    hidden = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    head = GroupHead(HeadSpec(3, where, detach_trunk=True), 4, mesh, seed=0)
    out = critic_output(torch.zeros(2, 5, 1), hidden, by_hand(), head)
    expected = torch.stack(
        [head.weight @ hidden[p, row] + head.bias for row, p in enumerate(positions)]
    )
    assert out.group_logits is not None
    torch.testing.assert_close(out.group_logits, expected)
