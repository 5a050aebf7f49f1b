"""Micro-batches: every row once, widths of their longest row, answers back in the caller's
order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from gipo_megatron.data.batching import load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.tokenizer import load_tokenizer
from gipo_megatron.megatron.microbatches import (
    OVERHEAD,
    MicroBatch,
    gather,
    padded_length,
    plan,
    resize,
    widen,
)
from gipo_megatron.types import CriticOutput, Pairs, Sequences, TokenStats
from tests.data.fixtures import SHARED, needs_shared_data
from tests.parity.tiny import RAGGED, pairs, weighted

LENGTHS = [p + r for p, r in RAGGED]  # 12 8 16 10 4 19 11 8


def test_a_score_reads_whole_texts_and_no_positions() -> None:
    """A reward model's rows may have their first token inside the mask; no log-prob is read of
    them."""
    rows = weighted().inner
    whole = replace(rows, mask=torch.arange(rows.mask.shape[1]) < rows.lengths[:, None])
    assert [slot.positions for slot in plan(whole, 3)] == [None] * 3
    assert all(slot.positions is not None for slot in plan(rows, 3))


def test_longest_first_and_no_wider_than_needed() -> None:
    slots = plan(weighted(), 3)
    assert [slot.index.tolist() for slot in slots] == [[5, 2, 0], [6, 3, 1], [7, 4]]
    assert [slot.sequences.tokens.shape[1] for slot in slots] == [19, 11, 8]
    # the loss's tensors are whole
    assert [slot.rows.old.shape[1] for slot in slots] == [19, 19, 19]


def test_widths_are_rounded_up() -> None:
    slots = plan(weighted(), 3, length_multiple=4)
    assert [slot.sequences.mask.shape[1] for slot in slots] == [20, 12, 8]
    assert slots[0].sequences.mask[:, 19].sum() == 0
    assert sum(int(slot.sequences.mask.sum()) for slot in slots) == sum(r for _, r in RAGGED)


@pytest.mark.parametrize(
    ("device", "longest", "multiple", "width"),
    [
        ("cpu", 1001, 1, 1001),
        ("cpu", 1001, 4, 1004),
        ("cuda", 1, 1, 64),
        ("cuda", 64, 1, 64),
        ("cuda", 449, 1, 512),
        ("cuda", 512, 1, 512),
        ("cuda", 513, 1, 640),
        ("cuda", 1001, 1, 1024),
        ("cuda", 2048, 64, 2048),  # FP8's 16 tokens on each of four ranks
        ("cuda", 700, 48, 768),  # on each of three: 384 divides by 48 and by 128
        ("cuda", 100, 3, 192),
    ],
)
def test_widths_on_a_gpu_are_few(device: str, longest: int, multiple: int, width: int) -> None:
    assert padded_length(longest, multiple, torch.device(device)) == width


def test_sizes_are_found_on_the_host() -> None:
    """The meta device stands for a GPU: its tensors have no values, so planning that read one back
    would fail. Idle slots included."""
    slots = plan(weighted().block(0, 5), 2, torch.device("meta"), slot_multiple=4)
    assert [slot.sequences.tokens.shape for slot in slots] == [(2, 64), (1, 64), (1, 64), (1, 64)]
    assert all(slot.positions.is_meta and slot.rows.inner.tokens.is_meta for slot in slots)
    here = plan(weighted().block(0, 5), 2, slot_multiple=4)
    assert (
        [len(slot.positions) for slot in slots]
        == [len(slot.positions) for slot in here]
        == [9 + 14, 5, 2, 3]
    )
    outputs = [torch.empty(len(slot.index), device="meta") for slot in slots]
    assert gather(slots, list(outputs)).shape == (5,)


def test_positions_are_of_the_trimmed_mask() -> None:
    for batch in (weighted(), pairs()):
        slots = plan(batch, 3, length_multiple=4, slot_multiple=3)
        assert len(slots) == 3
        for slot in slots:
            assert torch.equal(slot.positions, slot.sequences.mask.flatten().nonzero()[:, 0])


@pytest.mark.parametrize(
    ("rows", "micro_batch", "sizes", "idle"),
    [(8, 3, [2, 2, 2, 2], 0), (3, 4, [2, 1], 0), (1, 4, [1, 1], 1), (5, 1, [1] * 6, 1)],
)
def test_slots_are_a_multiple_for_interleaved_pipelines(
    rows: int, micro_batch: int, sizes: list[int], idle: int
) -> None:
    slots = plan(weighted().block(0, rows), micro_batch, slot_multiple=2)
    assert [len(slot.index) for slot in slots] == sizes
    assert [slot.idle for slot in slots] == [False] * (len(sizes) - idle) + [True] * idle
    assert sorted(i for slot in slots if not slot.idle for i in slot.index.tolist()) == list(
        range(rows)
    )


def test_gather_undoes_the_order() -> None:
    slots = plan(weighted(), 3, slot_multiple=4)
    outputs = [
        widen(TokenStats(slot.sequences.tokens.float() * slot.sequences.mask, None), slot.width)
        for slot in slots
    ]
    whole = gather(slots, outputs)
    rows = weighted().inner
    assert isinstance(whole, TokenStats) and whole.entropy is None
    assert torch.equal(whole.logprobs, rows.tokens.float() * rows.mask)


def test_gather_of_values_and_group_logits() -> None:
    slots = plan(weighted().block(0, 5), 2, slot_multiple=4)  # 3 slots of rows become 4
    outputs = [
        widen(
            CriticOutput(slot.sequences.tokens.float(), slot.sequences.lengths[:, None].float()),
            slot.width,
        )
        for slot in slots
    ]
    whole = gather(slots, outputs)
    assert isinstance(whole, CriticOutput) and whole.group_logits is not None
    assert whole.values.shape == (5, 19) and whole.group_logits[:, 0].tolist() == LENGTHS[:5]


def test_pairs_stay_together() -> None:
    both = pairs()
    slots = plan(both, 3)
    # two pairs each: 3 + 1 would also do, even slots are faster
    assert [len(slot.sequences) for slot in slots] == [4, 4]
    for slot in slots:
        chosen, rejected = slot.sequences.ids.chunk(2)
        assert torch.equal(chosen, rejected)
    scores = gather(slots, [slot.sequences.lengths.float() for slot in slots])
    assert torch.equal(scores, both.sequences.lengths.float())


def test_resize() -> None:
    x = torch.arange(6).view(2, 3)
    assert resize(x, 2).tolist() == [[0, 1], [3, 4]]
    assert resize(x, 4).tolist() == [[0, 1, 2, 0], [3, 4, 5, 0]]


# ------------------------------------------------------------------------------------ token budgets


def texts(lengths: Sequence[int]) -> Sequences:
    """Rows of these lengths; of each the last token is the response."""
    each = torch.tensor(lengths)
    position = torch.arange(int(each.max()))
    mask = position == each[:, None] - 1
    return Sequences(mask.long(), mask, each - 1, each, torch.arange(len(each)))


def tokens(slots: list[MicroBatch]) -> int:
    return sum(slot.sequences.tokens.numel() for slot in slots)


def cuts(count: int) -> Iterator[list[int]]:
    """Every way to write `count` as a sum of sizes, in order."""
    for inner in itertools.product((False, True), repeat=count - 1):
        ends = [i + 1 for i, cut in enumerate(inner) if cut] + [count]
        yield [b - a for a, b in itertools.pairwise([0, *ends])]


@pytest.mark.parametrize("budget", [130, 200, 400, 1000])
def test_a_budget_is_cut_where_it_costs_least(budget: int) -> None:
    """Padded tokens and 64 more for each micro-batch, against every cut of ten rows."""
    generator, checked = torch.Generator().manual_seed(budget), 0
    for _ in range(5):
        lengths = torch.randint(1, 130, (10,), generator=generator).tolist()
        slots = plan(texts(lengths), None, micro_tokens=budget)
        sizes = [slot.sequences.tokens.shape for slot in slots]
        assert all(rows * width <= budget for rows, width in sizes)
        assert [width for _, width in sizes] == sorted((w for _, w in sizes), reverse=True)
        assert sorted(i for slot in slots for i in slot.index.tolist()) == list(range(10))
        longest, costs = sorted(lengths, reverse=True), []
        for cut in cuts(10):
            starts = [0, *itertools.accumulate(cut)]
            whole = [rows * longest[start] for rows, start in zip(cut, starts, strict=False)]
            if max(whole) <= budget:
                costs.append(sum(whole) + 64 * len(cut))
        assert tokens(slots) + OVERHEAD * len(slots) == min(costs)
        checked += len(costs)
    assert checked > 100


def test_a_row_above_the_budget_is_alone() -> None:
    """Widths are rounded up after the recipe's check: a longest row may then exceed the budget."""
    slots = plan(texts([30, 31, 9, 9]), None, micro_tokens=31, length_multiple=8)
    assert [slot.sequences.tokens.shape for slot in slots] == [(1, 32), (1, 32), (1, 16), (1, 16)]
    assert [slot.real for slot in slots] == [31, 30, 9, 9]


def test_a_budget_counts_both_halves_of_a_pair() -> None:
    short, long = texts([5, 9, 3, 4]), texts([9, 8, 9, 9])
    width = torch.zeros(4, 9)
    both = Pairs(replace(short, tokens=width, mask=width.bool()), long, ("",) * 4)
    slots = plan(both, None, micro_tokens=36)
    assert [slot.sequences.tokens.shape for slot in slots] == [(4, 9), (4, 9)]
    assert sum(slot.real for slot in slots) == 5 + 9 + 3 + 4 + 9 + 8 + 9 + 9


def test_more_slots_of_a_budget() -> None:
    """For an interleaved pipeline, or because another replica has more: the largest are halved,
    then idle ones are added, which hold no token."""
    rows = texts([4] * 5)
    for least, sizes in ((1, [3, 2]), (3, [1, 1, 1, 2]), (5, [1] * 6)):
        slots = plan(rows, None, micro_tokens=20, slot_multiple=2, least_slots=least)
        assert [len(slot.index) for slot in slots] == sizes
        assert [slot.idle for slot in slots] == [i >= 5 for i in range(len(sizes))]
        assert sum(slot.real for slot in slots) == 20
    same = plan(rows, 2, least_slots=5)
    assert [len(slot.index) for slot in same] == [1] * 5


def test_padding_of_dialogues() -> None:
    """Lengths like those of HH (log-normal, median 155, mean 190, at most 1024), 32 rows a replica:
    under 5 %; four rows a micro-batch have more than twice that."""
    generator = torch.Generator().manual_seed(0)
    real, padded, by_rows = 0, 0, 0
    for _ in range(20):
        drawn = (155 * (0.64 * torch.randn(32, generator=generator)).exp()).long().clamp(16, 1024)
        slots = plan(texts(drawn.tolist()), None, micro_tokens=8192)
        real += sum(slot.real for slot in slots)
        padded += tokens(slots)
        by_rows += tokens(plan(texts(drawn.tolist()), 4))
        assert len(slots) <= 14
    assert real > 20 * 32 * 150
    assert 1 - real / padded <= 0.05 and 1 - real / by_rows > 0.10


@needs_shared_data
def test_padding_of_hh() -> None:
    """Twelve minibatches of 64 on two replicas, as in hh_sft: under 5 %, and the replicas' padded
    tokens are close to each other."""
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "mistral_v1"))
    config = DataConfig(path=str(SHARED / "hh-rlhf"), template="hh")
    data = load_data(config, tokenizer, "train", 0, "sft")
    real, padded, apart = 0, 0, []
    for step in range(12):
        replicas = [
            plan(data.examples(step, 64, rank, 2), None, micro_tokens=8192) for rank in (0, 1)
        ]
        one, other = map(tokens, replicas)
        real += sum(slot.real for slots in replicas for slot in slots)
        padded += one + other
        apart.append(abs(one - other) / (one + other))
    assert real > 12 * 64 * 150 and 1 - real / padded <= 0.05
    assert sum(apart) / 12 < 0.03


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="without rows"):
        plan(weighted().block(0, 0), 2)
