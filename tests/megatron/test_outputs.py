from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gipo_megatron.megatron import outputs
from gipo_megatron.megatron.heads import GroupHead
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.outputs import critic_output, last_token_score, response_positions
from gipo_megatron.planning.activations import READOUT_BLOCKS
from gipo_megatron.specs import HeadSpec
from gipo_megatron.types import Sequences, TokenStats
from tests.parity.outputs_reference import ReadoutCase, plain_token_stats, stats_of_logits
from tests.watch import LiveBytes

MIB = 2**20
# 64 columns, 128 columns, and all at once, of the case's 19 rows
BLOCKS = {64: 1, 128: 10_000, 245: 8 * MIB}


@pytest.fixture
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many columns of logits are made at a time."""
    monkeypatch.setitem(outputs.BLOCK_BYTES, "cpu", BLOCKS[request.param])
    return request.param


any_blocks = pytest.mark.parametrize("columns", BLOCKS, indirect=True)


def leaves(case: ReadoutCase, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    hidden, weight = (x.to(dtype, copy=True) for x in (case.hidden, case.weight))
    return hidden.requires_grad_(), weight.requires_grad_()


def token_stats(case: ReadoutCase, hidden: Tensor, weight: Tensor, **arguments: Any) -> TokenStats:
    positions = response_positions(case.sequences.mask)
    return outputs.token_stats(
        hidden, weight, case.sequences, positions, vocab_size=case.vocab, **arguments
    )


def distance(found: Tensor | None, expected: Tensor | None) -> float:
    """Relative, over the whole tensor."""
    assert found is not None and expected is not None
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@any_blocks
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_float64_autograd(mesh: Mesh, columns: int, temperature: float) -> None:
    case = ReadoutCase.make()
    hidden, weight = leaves(case)
    stats = token_stats(case, hidden, weight, mesh=mesh, temperature=temperature, entropy=True)
    case.total(stats).backward()
    logprobs, entropy, grad_hidden, grad_weight = plain_token_stats(case, temperature)
    torch.testing.assert_close(stats.logprobs.double(), logprobs, atol=3e-6, rtol=3e-7)
    assert stats.entropy is not None
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=3e-6, rtol=3e-7)
    assert distance(hidden.grad, grad_hidden) < 1e-6
    assert distance(weight.grad, grad_weight) < 1e-6
    assert torch.equal(hidden.detach(), case.hidden), "the hidden states were changed"
    assert weight.grad is not None and not weight.grad[case.vocab :].any()
    assert hidden.grad is not None and not hidden.grad[:, :-1][~case.sequences.mask[:, 1:]].any()
    assert not stats.logprobs[~case.sequences.mask].any()


@any_blocks
def test_without_entropy(mesh: Mesh, columns: int) -> None:
    case = ReadoutCase.make()
    one, two = leaves(case), leaves(case)
    plain = token_stats(case, *one, mesh=mesh)
    both = token_stats(case, *two, mesh=mesh, entropy=True)
    assert plain.entropy is None and torch.equal(plain.logprobs, both.logprobs)
    plain.logprobs.sum().backward()
    both.logprobs.sum().backward()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=0)


def test_an_entropy_alone_has_a_gradient(mesh: Mesh) -> None:
    case = ReadoutCase.make()
    case.weights[0] = 0.0
    leaf, expected = leaves(case), plain_token_stats(case, 1.0)
    stats = token_stats(case, *leaf, mesh=mesh, entropy=True)
    assert stats.entropy is not None
    (stats.entropy * case.weights[1]).sum().backward()
    assert distance(leaf[0].grad, expected[2]) < 1e-6
    assert distance(leaf[1].grad, expected[3]) < 1e-6


def test_a_large_logit_does_not_cost_digits(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits near 90, and a near certain token: fp32's steps are 8e-6 there."""
    monkeypatch.setitem(outputs.BLOCK_BYTES, "cpu", 1)
    case = ReadoutCase.make()
    hidden = torch.cat([case.hidden, torch.ones(3, 12, 1)], 2)
    weight = torch.cat([0.1 * case.weight, torch.full((256, 1), 80.0)], 1)
    weight[100, 16] += 10.0
    case.sequences.tokens.fill_(100)
    case = replace(case, hidden=hidden, weight=weight)
    stats = token_stats(case, hidden, weight, mesh=mesh, entropy=True)
    logits = (hidden @ weight[: case.vocab].T).double()  # as rounded as ours
    expected = stats_of_logits(logits, case.sequences, 1.0)
    assert stats.entropy is not None
    torch.testing.assert_close(stats.logprobs.double(), expected[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(stats.entropy.double(), expected[1], atol=1e-6, rtol=1e-4)


@any_blocks
def test_bf16_logits_are_summed_in_fp32(mesh: Mesh, columns: int) -> None:
    """Small integers: every product has one rounding, whatever the order of its sums."""
    g = torch.Generator().manual_seed(0)
    case = ReadoutCase.make()
    hidden = torch.randint(-8, 9, case.hidden.shape, generator=g) / 4
    weight = torch.randint(-8, 9, case.weight.shape, generator=g) / 4
    case = replace(case, hidden=hidden, weight=weight)
    leaf, plain = leaves(case, torch.bfloat16), plain_token_stats(case, 1.0, torch.bfloat16)
    stats = token_stats(case, *leaf, mesh=mesh, entropy=True)
    case.total(stats).backward()
    assert stats.logprobs.dtype == torch.float32
    torch.testing.assert_close(stats.logprobs.double(), plain[0], atol=3e-6, rtol=0)
    for x, expected in zip(leaf, plain[2:], strict=True):
        assert x.grad is not None and x.grad.dtype == torch.bfloat16
        assert distance(x.grad, expected) < 4e-3, "2^-8: no rounding of every block's sum"


def test_an_empty_mask_gives_zeros_that_can_be_differentiated(mesh: Mesh) -> None:
    case = ReadoutCase.make()
    empty = replace(case.sequences, mask=torch.zeros_like(case.sequences.mask))
    hidden, weight = leaves(case)
    stats = token_stats(replace(case, sequences=empty), hidden, weight, mesh=mesh, entropy=True)
    stats.logprobs.sum().backward()
    assert not stats.logprobs.any()
    for x in (hidden, weight):
        assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any()


def test_a_first_token_inside_the_mask_is_refused(mesh: Mesh) -> None:
    mask = ReadoutCase.make().sequences.mask.clone()
    mask[0, 0] = True
    with pytest.raises(AssertionError, match="nothing predicts it"):
        response_positions(mask)


def on_meta(
    mesh: Mesh, vocabulary: int, length: int, hidden_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, TokenStats]:
    """Log-probs and entropies of 4 rows, all but the first token masked, without any number."""
    mask = (torch.arange(length) > 0).expand(4, -1)
    ones = torch.ones(4, dtype=torch.long)
    sequences = Sequences(torch.zeros(4, length).long(), mask, ones, length * ones, ones)
    hidden = torch.empty(4, length, hidden_size, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(vocabulary, hidden_size, dtype=dtype, device="meta", requires_grad=True)
    positions = response_positions(mask).to("meta")
    stats = outputs.token_stats(
        hidden,
        weight,
        sequences.to("meta"),
        positions,
        vocab_size=vocabulary,
        mesh=mesh,
        entropy=True,
    )
    return hidden, weight, stats


def test_nothing_is_read_back_from_the_device(mesh: Mesh) -> None:
    """Meta tensors have no values: code that reads one fails here, and on a GPU it would wait."""
    hidden, weight, stats = on_meta(mesh, 4096, 32, 16, torch.float32)
    assert stats.entropy is not None and stats.logprobs.shape == stats.entropy.shape == (4, 32)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert all(x.grad is not None and x.grad.is_meta for x in (hidden, weight))
    raw = torch.empty(3, 12, 1, device="meta")
    there = ReadoutCase.make().sequences.to("meta")
    assert (
        critic_output(raw, raw.transpose(0, 1), there, None).values.is_meta
        and last_token_score(raw, there).is_meta
    )


@pytest.mark.parametrize(
    ("device", "rows", "columns"),
    [("cpu", 512, 4096), ("cpu", 4000, 512), ("cpu", 10**6, 64), ("cuda", 8192, 16384)],
)
def test_columns_of_a_block(device: str, rows: int, columns: int) -> None:
    """8 MiB, or 512 MiB, over 4 bytes a logit, as a multiple of 64."""
    assert outputs.block_columns(rows, torch.device(device)) == columns


class Operations(TorchDispatchMode):
    """Names of the operations that put out a matrix as wide as a block."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.names = columns, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[-1:] == (self.columns,):
            self.names.append(str(func))
        return out


@any_blocks
def test_an_entropy_outside_the_loss_costs_nothing_in_the_backward_pass(
    mesh: Mesh, columns: int
) -> None:
    case = ReadoutCase.make()
    seen: dict[str, tuple[list[str], Tensor | None]] = {}
    for name, entropy in (("none", False), ("reported", True), ("used", True)):
        hidden, weight = leaves(case)
        stats = token_stats(case, hidden, weight, mesh=mesh, entropy=entropy)
        total = stats.logprobs.sum()
        if name == "used":
            assert stats.entropy is not None
            total = total + 0.01 * stats.entropy.sum()
        with Operations(columns) as watch:
            total.backward()
        seen[name] = watch.names, hidden.grad
    assert len(seen["none"][0]) > 3 and seen["none"][0] == seen["reported"][0] != seen["used"][0]
    assert torch.equal(seen["none"][1], seen["reported"][1])
    assert not torch.equal(seen["none"][1], seen["used"][1])


@any_blocks
def test_products_are_made_for_masked_tokens_only(mesh: Mesh, columns: int) -> None:
    """2 · n · H · V operations forward. Backward twice as many, and once more where the logits are
    made again."""
    case = ReadoutCase.make()
    one = 2 * int(case.sequences.mask.sum()) * 16 * case.vocab
    with FlopCounterMode(display=False) as forward:
        stats = token_stats(case, *leaves(case), mesh=mesh)
    with FlopCounterMode(display=False) as backward:
        stats.logprobs.sum().backward()
    assert forward.get_total_flops() == one
    assert backward.get_total_flops() == (2 if columns == case.vocab else 3) * one


@any_blocks
def test_nothing_is_kept_without_a_gradient(mesh: Mesh, columns: int) -> None:
    case = ReadoutCase.make()
    leaf = leaves(case)
    with LiveBytes() as live, torch.no_grad():
        stats = token_stats(case, *leaf, mesh=mesh)
        assert sum(live.sizes.values()) <= stats.logprobs.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_size_of_the_logits(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """4 x 1024 tokens, hidden size 256: 2.3 GiB of logits at Qwen's vocabulary. The largest tensors
    are the hidden states, one block, the weight's gradient; beside that gradient the peak is as
    high as at a vocabulary of 4096."""
    monkeypatch.setitem(outputs.BLOCK_BYTES, "cuda", outputs.BLOCK_BYTES["cpu"])  # meta is no CPU
    peaks = {}
    for vocabulary in (4096, 151936):
        with LiveBytes() as live:
            hidden, weight, stats = on_meta(mesh, vocabulary, 1024, 256, dtype)
            assert stats.entropy is not None
            (stats.logprobs.sum() + stats.entropy.sum()).backward()
        block = outputs.BLOCK_BYTES["cpu"]
        assert live.largest <= max(hidden.nbytes, block, weight.nbytes), vocabulary
        assert live.peak > 2 * block + 2 * weight.nbytes
        peaks[vocabulary] = live.peak - 2 * weight.nbytes
    assert peaks[151936] <= 1.3 * peaks[4096]


def test_blocks_that_are_held_at_once(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's figure (activations.READOUT_BLOCKS), forward and backward; a block that is all
    is kept in between."""
    small = 0.1  # of a block: hidden states, a few numbers a row
    held = {}
    for name, size in (("many", 4 * MIB), ("one", 64 * MIB)):
        monkeypatch.setitem(outputs.BLOCK_BYTES, "cuda", size)
        # 1020 rows read; a block of many has 1024 columns
        with LiveBytes() as forward:
            _, weight, stats = on_meta(mesh, 4096, 256, 16, torch.bfloat16)
        assert stats.entropy is not None
        total = (stats.logprobs + stats.entropy).sum()
        with LiveBytes() as backward:
            total.backward()
        block = 4 * 1020 * (1024 if name == "many" else 4096)
        held[name] = (forward.peak / block, (backward.peak - weight.nbytes) / block)
    assert held["many"][0] == pytest.approx(READOUT_BLOCKS, abs=small)
    assert held["many"][1] == pytest.approx(READOUT_BLOCKS, abs=small)
    assert held["one"][0] == pytest.approx(READOUT_BLOCKS, abs=small)
    # the block that is kept was made before
    assert held["one"][1] == pytest.approx(READOUT_BLOCKS, abs=small)


@pytest.mark.multiprocess
def test_token_stats_with_a_split_vocabulary(model_cells: list[dict[str, Any]]) -> None:
    names = ("logprobs", "entropy", "hidden", "weight")
    found = [cells[f"token_stats/{name}"] for cells in model_cells for name in names]
    assert len(found) == 8 and max(found) < 1e-6, found


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
