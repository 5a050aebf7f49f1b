from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from gipo_megatron.data.batching import Dataset, load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.tokenizer import byte_tokenizer, load_tokenizer
from gipo_megatron.errors import UserError
from tests.data.fixtures import SHARED, dialogue, needs_shared_data, write_rows

TOKENIZER = byte_tokenizer()


def dataset(folder: Path, rows: int = 10, kind: str = "preference", seed: int = 0) -> Dataset:
    write_rows(
        folder / "s" / "train.jsonl",
        [{"prompt": f"q{i}:", "chosen": "y" * (i + 1), "rejected": "n"} for i in range(rows)],
    )
    return load_data(
        DataConfig(path=str(folder), max_length=64, max_response=32), TOKENIZER, "all", seed, kind
    )


def test_order_is_a_permutation_an_epoch(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    positions = [row for step in range(15) for row in data.order(step, 4)]
    epochs = [positions[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert dataset(tmp_path, seed=1).order(0, 10) != data.order(0, 10)


def test_order_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    """A resumed run asks for step 7 first; a batch may be larger than the set."""
    forward = dataset(tmp_path)
    want = [forward.order(step, 24) for step in range(8)]
    assert [dataset(tmp_path).order(step, 24) for step in reversed(range(8))] == want[::-1]
    assert [row for rows in want for row in rows] == forward.order(0, 192)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_row_i_is_row_i_over_size_of_replica_i_mod_size(tmp_path: Path, dp_size: int) -> None:
    data = dataset(tmp_path)
    order = data.order(5, 6)
    for rank in range(dp_size):
        prompts = data.prompts(5, 6, 2, rank, dp_size)
        assert prompts.prompt_id.tolist() == [row for row in order for _ in range(2)][rank::dp_size]
        assert prompts.sample_id.tolist() == list(range(60, 72))[rank::dp_size]


@pytest.mark.parametrize(
    ("dp_size", "places"),
    [(1, [[0, 1, 2, 3, 4, 5]]), (2, [[0, 3, 4], [1, 2, 5]]), (3, [[0, 5], [1, 4], [2, 3]])],
)
def test_pairs_and_examples_are_dealt_by_length(
    tmp_path: Path, dp_size: int, places: list[list[int]]
) -> None:
    """Places by length, the longest 0. A row's chosen response is longer the higher its number;
    the order on a replica is the batch's."""
    data = dataset(tmp_path)
    order = data.order(5, 6)
    longest = sorted(order, reverse=True)
    for rank in range(dp_size):
        own = {longest[place] for place in places[rank]}
        wanted = [row for row in order if row in own]
        assert data.pairs(5, 6, rank, dp_size).row_ids.tolist() == wanted
        assert data.examples(5, 6, rank, dp_size).ids.tolist() == wanted


def test_a_row_that_a_batch_has_twice_is_dealt_twice(tmp_path: Path) -> None:
    data = dataset(tmp_path, rows=3)
    order = data.order(0, 8)
    found = [row for rank in (0, 1) for row in data.pairs(0, 8, rank, 2).row_ids.tolist()]
    assert Counter(found) == Counter(order) and max(Counter(order).values()) == 3


def test_a_batch_that_cannot_be_shared_evenly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch of 5"):
        dataset(tmp_path).pairs(0, 5, 0, 2)


def test_pairs_have_one_shape_and_masks_on_the_response(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    pairs = data.pairs(0, 4)
    assert pairs.chosen.tokens.shape == pairs.rejected.tokens.shape
    for i, row in enumerate(pairs.row_ids.tolist()):
        for half, reply in ((pairs.chosen, "y" * (row + 1)), (pairs.rejected, "n")):
            length, start = int(half.lengths[i]), int(half.prompt_lengths[i])
            assert half.tokens[i, :length].tolist() == [257, *f"q{row}:{reply}".encode(), 258]
            assert half.tokens[i, length:].eq(256).all() and start == 4
            assert half.mask[i].nonzero().flatten().tolist() == list(range(start, length))
    assert pairs.source == ("s",) * 4


def test_prompts_keep_their_chosen_responses(tmp_path: Path) -> None:
    """In any order, as the pairs' chosen halves; data without responses have none."""
    rows = [{"prompt": f"q{i}:", "chosen": "y" * (i + 1), "rejected": "n"} for i in range(4)]
    write_rows(tmp_path / "a.jsonl", rows)
    path = str(tmp_path / "a.jsonl")
    config = DataConfig(path=path, format="preference")
    prompts, pairs = (load_data(config, TOKENIZER, "all", 0, k) for k in ("prompt", "preference"))
    assert prompts.answered
    found, wanted = prompts.answers([2, 0, 2]), pairs.pairs_at([2, 0, 2])[0].chosen
    width = found.tokens.shape[1]
    assert torch.equal(found.tokens, wanted.tokens[:, :width]) and found.ids.tolist() == [2, 0, 2]
    assert torch.equal(found.mask, wanted.mask[:, :width]) and int(found.mask.sum()) == 4 + 2 + 4
    bare = load_data(DataConfig(path=path, format="prompt"), TOKENIZER, "all", 0, "prompt")
    assert not bare.answered


def test_prompts_carry_their_text_and_extras(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "gold": 1.5}])
    data = load_data(
        DataConfig(format="prompt", path=str(tmp_path / "a.jsonl")), TOKENIZER, "all", 0, "prompt"
    )
    assert data.prompts(0, 1, 2).extras == ({"gold": 1.5, "prompt": "q"},) * 2


@pytest.mark.parametrize(("count", "dp_size"), [(5, 1), (5, 2), (5, 3), (2, 4)])
def test_held_out_rows_in_order_with_a_ragged_tail(
    tmp_path: Path, count: int, dp_size: int
) -> None:
    data = dataset(tmp_path)
    indices = [7, 3, 9, 0, 4][:count]
    parts = [data.pairs_at(indices, rank, dp_size) for rank in range(dp_size)]
    assert len({len(pairs) for pairs, _ in parts}) == 1
    rows = {
        i * dp_size + rank: int(pairs.row_ids[i])
        for rank, (pairs, ok) in enumerate(parts)
        for i in range(len(pairs))
        if ok[i]
    }
    assert [rows[i] for i in sorted(rows)] == indices
    for rank in range(dp_size):
        prompts, valid = data.prompts_at(indices, rank, dp_size)
        assert torch.equal(valid, parts[rank][1]) and torch.equal(
            prompts.prompt_id, parts[rank][0].row_ids
        )
        assert prompts.sample_id[valid].tolist() == indices[rank::dp_size]
        examples, _ = data.examples_at(indices, rank, dp_size)
        assert torch.equal(examples.ids, prompts.prompt_id)


def test_a_preference_source_serves_all_kinds(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": b} for b in ("b", "b", "c")]
    write_rows(tmp_path / "train.jsonl", rows)
    sizes = {}
    for kind in ("preference", "sft", "prompt"):
        data = load_data(DataConfig(path=str(tmp_path)), TOKENIZER, "all", 0, kind)
        sizes[kind] = (len(data), [line for line in data.report if line.startswith("dropped")])
    file = tmp_path / "train.jsonl"
    duplicate = f"dropped 1: duplicate row (first: {file} line 2)"
    assert sizes["preference"] == sizes["sft"] == (2, [duplicate])
    assert sizes["prompt"] == (
        1,
        [duplicate, f"dropped 1: prompt seen before (first: {file} line 3)"],
    )


def test_drops_are_reported_by_reason(tmp_path: Path) -> None:
    good, other = dialogue("h: q", "a: x"), dialogue("h: q", "a: y")
    rows = [
        {"chosen": good, "rejected": other},
        {"chosen": good, "rejected": good},
        {"chosen": good, "rejected": "\n\nHuman: q"},
    ] + [{"chosen": good, "rejected": "\n\nHuman: q\n\nAssistant:"}] * 2
    file = write_rows(tmp_path / "hh" / "train.jsonl", rows)
    config = DataConfig(path=str(tmp_path), allow_drops=True)
    data = load_data(config, TOKENIZER, "all", 0, "preference")
    assert data.report == [
        f"read {file}: 5 rows, all rows",
        "kept 1 of 5 rows",
        f"dropped 1: chosen equals rejected (first: {file} line 2)",
        f"dropped 2: empty response (first: {file} line 4)",
        f"dropped 1: no Assistant turn (first: {file} line 3)",
        "source hh: 1 rows",
    ]


def test_without_a_test_file_a_hash_splits(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "a.jsonl",
        [{"prompt": f"question {i // 2}", "response": str(i)} for i in range(400)],
    )
    config = DataConfig(format="sft", path=str(file), held_out=0.25)
    train, test, whole = (
        load_data(config, TOKENIZER, split, 0, "sft") for split in ("train", "test", "all")
    )
    sides = [{example.prompt[0].text for example in data.rows} for data in (train, test)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200
    assert len(train) + len(test) == len(whole) == 400
    assert 0.15 < len(test) / 400 < 0.35


def test_parts_divide_the_training_rows_alone(tmp_path: Path) -> None:
    """They are disjoint by the first human turn and cover everything; held-out rows stay."""
    rows = [
        {
            "chosen": dialogue(f"h: question {i // 3}", "a: x", f"h: more {i}", "a: yes"),
            "rejected": dialogue(f"h: question {i // 3}", "a: x", f"h: more {i}", "a: no"),
        }
        for i in range(120)
    ]
    path = str(write_rows(tmp_path / "a.jsonl", rows))

    def load(part: str, split: str) -> Dataset:
        return load_data(DataConfig(path=path, part=part), TOKENIZER, split, 0, "preference")

    whole = load("", "train")
    parts = [load(f"{k}/3", "train") for k in (1, 2, 3)]
    assert {row.prompt for part in parts for row in part.rows} == {row.prompt for row in whole.rows}
    assert sum(map(len, parts)) == len(whole) and all(map(len, parts))
    turns = [{row.prompt[0].text for row in part.rows} for part in parts]
    assert len(set.union(*turns)) == sum(map(len, turns))
    assert [row for row in whole.rows if row in parts[1].rows] == list(parts[1].rows)
    assert load("1/3", "test").rows == load("2/3", "test").rows == load("", "test").rows
    kept = parts[0].report.index(f"kept {len(whole)} of {len(whole)} rows")
    assert parts[0].report[kept + 1] == f"part 1/3 by the first human turn: {len(parts[0])} rows"


@pytest.mark.parametrize(
    "part", ["0/2", "3/2", "1/0", "1", "a/b", "1/2/3", "-1/2", " 1/2", "1.5/2"]
)
def test_a_part_that_is_none(part: str) -> None:
    with pytest.raises(UserError, match="is no part") as raised:
        DataConfig(part=part)
    assert raised.value.where == "data.part"


def test_a_part_without_rows_is_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": "one question", "response": str(i)} for i in range(4)]
    write_rows(tmp_path / "train.jsonl", rows)
    loaded = []
    for k in (1, 2):
        config = DataConfig(format="sft", path=str(tmp_path), part=f"{k}/2")
        try:
            loaded.append(len(load_data(config, TOKENIZER, "train", 0, "sft")))
        except UserError as error:
            assert f"no train rows in part {k}/2" in error.what and "fewer parts" in error.fix
    assert loaded == [4]


def test_nothing_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    with pytest.raises(UserError, match="no train rows left of 1") as raised:
        load_data(DataConfig(path=str(tmp_path), held_out=0.0), TOKENIZER, "train", 0, "preference")
    assert "chosen equals rejected" in raised.value.fix


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        (DataConfig(format="prompt"), "sft", "has no sft rows"),
        (DataConfig(format="x"), "sft", "unknown"),
    ],
)
def test_formats_and_kinds_that_do_not_go_together(
    config: DataConfig, kind: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        load_data(config, TOKENIZER, "train", 0, kind)


def test_the_fingerprint_is_of_the_rows(tmp_path: Path) -> None:
    a, b, c = (dataset(tmp_path / str(i), rows).fingerprint for i, rows in enumerate((4, 4, 5)))
    assert a == b != c


def test_the_fingerprint_is_of_the_columns_beside_the_rows_too(tmp_path: Path) -> None:
    """A gold reward or a group that is changed is other data."""
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    found = []
    for gold in (1, 2):
        write_rows(tmp_path / "s" / "train.jsonl", [{**row, "gold_chosen": gold}])
        config = DataConfig(path=str(tmp_path))
        found.append(load_data(config, TOKENIZER, "all", 0, "preference"))
    assert [data.rows[0].extras for data in found] == [{"gold_chosen": 1}, {"gold_chosen": 2}]
    assert found[0].fingerprint != found[1].fingerprint


# ---------------------------------------------------------------------------------------- real data


@needs_shared_data
@pytest.mark.parametrize(
    ("source", "split", "kept", "drops"),
    [  # counted by a script that applies the rule of the data's README line by line
        (
            "harmless-base",
            "train",
            1843,
            {"empty response": 4, "chosen and rejected have different prompts": 4},
        ),
        ("harmless-base", "test", 233, {"chosen and rejected have different prompts": 1}),
        ("helpful-base", "train", 1572, {"empty response": 3}),
        ("helpful-base", "test", 208, {}),
    ],
)
def test_hh_rows_and_drops(source: str, split: str, kept: int, drops: dict[str, int]) -> None:
    config = DataConfig(path=str(SHARED / "hh-rlhf"), source=[source])
    data = load_data(
        config, load_tokenizer(str(SHARED / "tokenizers" / "hh_bytebpe_4k")), split, 0, "preference"
    )
    assert (len(data), data.sources) == (kept, (source,))
    assert Counter(drops) == data._tally.dropped


@needs_shared_data
def test_every_hh_prompt_is_a_prefix_under_sentencepiece() -> None:
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "mistral_v1"))
    data = load_data(
        DataConfig(path=str(SHARED / "hh-rlhf"), max_length=4096),
        tokenizer,
        "test",
        0,
        "preference",
    )
    assert data.sources == ("harmless-base", "helpful-base") and len(data) == 441
    checked = 0
    for start in range(0, 441, 63):
        rows = list(range(start, start + 63))
        pairs, (prompts, _) = data.pairs_at(rows)[0], data.prompts_at(rows)
        for half in (pairs.chosen, pairs.rejected):
            assert torch.equal(half.prompt_lengths, prompts.lengths)
            checked += sum(
                torch.equal(a[:n], b[:n])
                for a, b, n in zip(half.tokens, prompts.tokens, prompts.lengths, strict=True)
            )
    assert checked == 882
    assert not any("reaches back" in line or "lost turns" in line for line in data.report)


@needs_shared_data
@pytest.mark.parametrize(
    ("format", "kind", "split", "rows"),  # rows of the files, none of them bad
    [
        ("sft", "sft", "train", 1557),
        ("sft", "prompt", "test", 184),
        ("preference", "preference", "train", 788),
        ("preference", "preference", "test", 115),
    ],
)
def test_one_tldr_folder_serves_every_stage(format: str, kind: str, split: str, rows: int) -> None:
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "hh_bytebpe_4k"))
    data = load_data(
        DataConfig(format=format, path=str(SHARED / "tldr")), tokenizer, split, 0, kind
    )
    assert len(data) == rows
    assert all(
        row.prompt[0].text.startswith("SUBREDDIT: r/") and row.prompt[0].text.endswith("\n\nTL;DR:")
        for row in data.rows
    )
    assert all(
        text.startswith(" ") and not text.startswith("  ")
        for row in data.rows
        for text in row.responses
    )
    labelled = DataConfig(format=format, path=str(SHARED / "tldr"), columns={"source": "subreddit"})
    assert {"relationships", "AskReddit", "tifu"} < set(
        load_data(labelled, tokenizer, split, 0, kind).sources
    )
