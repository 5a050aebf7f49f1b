from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gipo_megatron.data.examples import Turn
from gipo_megatron.data.sources import open_sources
from gipo_megatron.data.splits import divide, hold_out, is_hidden, part_of, split_of
from gipo_megatron.errors import UserError
from tests.data.fixtures import write_rows

# words that mark a held-out row, as one pattern over a whole path
MARKED = re.compile(
    r"(?<![a-z])(tests?|testing|valid|validation|val|dev|eval|evaluation|he?o?ld[-_ ]?out)"
    r"(set|data|split)?(?![a-z])"
)
NAMES = ["a", "b", "data", "train", "test", "dev-00", "hh_test", "held_out", "latest", "contest"]
NAMES += ["validation", "testset", "train_eval", "part.1", "training", "0000", "trainer"]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4)


@given(st.sets(PATHS.map("/".join), min_size=1, max_size=8))
@example({"train/test", "train/train"})
@example({"test/train", "0000"})
@settings(deadline=None, max_examples=60, derandomize=True)
def test_no_row_marked_test_is_trained_on(paths: set[str]) -> None:
    """Each row is the path of its file. No file is left out without its name in `unread`."""
    with tempfile.TemporaryDirectory(prefix="rows") as folder:
        for path in paths:
            write_rows(Path(folder, f"{path}.jsonl"), [{"prompt": path}])
        read: dict[str, set[str]] = {"train": set(), "test": set()}
        unread: dict[str, str] = {"train": "", "test": ""}
        held_out = {path for path in paths if MARKED.search(path)}
        for split, prompts in read.items():
            try:
                sources = open_sources(folder, [], split, "prompt")
            except UserError as error:
                assert split == "train" and held_out == paths, error
                continue
            unread[split] = " ".join(name for source in sources for name in source.unread)
            for source in sources:
                prompts |= {row["prompt"] for _, row in source.rows}
        assert not read["train"] & held_out
        assert held_out <= read["test"] | {p for p in held_out if p in unread["test"]}
        assert all(p in read["train"] or p in unread["train"] for p in paths - held_out)


def test_names_that_mark_a_split() -> None:
    names = {
        "test": ["test.jsonl", "rows.test.jsonl.gz", "TEST", "myTestRows", "test-00000-of-00001"],
        "validation": ["dev", "valid_2", "held-out", "holdout", "evaluation.csv", "valset"],
        "train": ["train-00000-of-00002.parquet", "rows.train.jsonl", "training"],
        "": ["trainer.jsonl", "latest", "contest.csv", "protest", "rows.jsonl", "devices"],
    }
    for label, its in names.items():
        assert {split_of([name]) for name in its} == {label}
    assert split_of(["train", "test.jsonl"]) == split_of(["test", "train.jsonl"]) == "test"


@pytest.mark.parametrize(
    "name", [".git", "._rows.jsonl", "__MACOSX", "_SUCCESS", "rows.jsonl~", "~$rows.csv", "@eaDir"]
)
def test_hidden_names(name: str) -> None:
    assert is_hidden(name) and not is_hidden(f"a{name}a")


@pytest.mark.parametrize("inner", ["0000.jsonl", "data/rows.jsonl"])
def test_the_folder_itself_may_name_the_split(tmp_path: Path, inner: str) -> None:
    """But a name inside it wins, and a longer name of it marks nothing."""
    write_rows(tmp_path / "test" / inner, [{"prompt": "a"}])
    with pytest.raises(UserError, match="is marked test") as raised:
        open_sources(str(tmp_path / "test"), [], "train", "prompt")
    assert "rename" in raised.value.fix
    write_rows(tmp_path / "test" / "train.jsonl", [{"prompt": "b"}])
    (source,) = open_sources(str(tmp_path / "test"), [], "train", "prompt")
    assert [row["prompt"] for _, row in source.rows] == ["b"]


# ---------------------------------------------------------------------------------------- the hash


def chat(*texts: str, system: str = "") -> tuple[Turn, ...]:
    turns = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    return (*([Turn("system", system)] if system else []), *turns)


def test_the_first_turn_decides() -> None:
    """The first 8 bytes of its sha256, as a share of 2^64: white space at its ends is nothing."""
    rows = [chat(f" question {i} ", "a", str(i % 7)) for i in range(300)]
    digests = [hashlib.sha256(f"question {i}".encode()).digest() for i in range(300)]
    expected = [int.from_bytes(digest[:8], "big") / 2**64 < 0.2 for digest in digests]
    assert hold_out(rows, 0.2) == expected and 40 < sum(expected) < 80


@pytest.mark.parametrize(
    "rows",
    [
        [chat(f"q{i}", system="You help a bakery.") for i in range(60)],
        [chat("hi", "hello", f"q{i}") for i in range(60)],
        [chat(["hi", "hello"][i % 2], "yes?", f"q{i}") for i in range(60)],
        [chat("a joke", system=f"You are {i}.") for i in range(60)],
        [chat("hi", "hello", "how are you?", "well", f"q{i}", system="S") for i in range(60)],
    ],
)
def test_a_beginning_that_carries_nothing(rows: list[tuple[Turn, ...]]) -> None:
    assert 1 <= sum(hold_out(rows, 0.1)) <= 15


def test_personas_are_on_both_sides_and_questions_on_one() -> None:
    rows = [chat(f"q{i}", system=f"You are {who}.") for who in range(8) for i in range(20)]
    held_out = hold_out(rows, 0.1)
    questions = [
        {row[1].text for row, side in zip(rows, held_out, strict=True) if side is which}
        for which in (True, False)
    ]
    assert questions[0] and not questions[0] & questions[1]
    assert {row[0] for row, side in zip(rows, held_out, strict=True) if not side} == {
        row[0] for row in rows
    }


@pytest.mark.parametrize("count", range(2, 12))
def test_both_sides_get_a_row(count: int) -> None:
    rows = [chat(f"q{i}") for i in range(count)]
    for share in (0.001, 0.999):
        assert 0 < sum(hold_out(rows, share)) < count
    assert not any(hold_out(rows, 0.0)) and all(hold_out(rows, 1.0))


def test_a_rows_own_mark_wins() -> None:
    rows = [chat(f"q{i}") for i in range(4)]
    sides = divide(["train", "test", "", "validation"], rows, 0.0)
    assert sides == [False, True, False, True]


@given(
    st.lists(st.tuples(st.text(max_size=4), st.text(max_size=2)), max_size=30), st.integers(1, 5)
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_no_first_turn_is_in_two_parts(turns: list[tuple[str, str]], parts: int) -> None:
    """Each row is in one part of 1 … n, whatever system turn precedes and whatever turns follow."""
    for first, later in turns:
        user = Turn("user", first)
        plain = part_of((user,), parts)
        assert 1 <= plain <= parts
        assert part_of((Turn("system", later), user), parts) == plain
        assert part_of((user, Turn("assistant", later), Turn("user", later)), parts) == plain


def test_parts_are_even_and_independent_of_what_is_held_out() -> None:
    """Of 4000 prompts: every cell of held out × part has its expected size within 4 deviations."""
    prompts = [(Turn("user", f"question {i}"),) for i in range(4000)]
    held_out = hold_out(prompts, 0.25)
    for parts in (2, 4):
        found = [part_of(prompt, parts) for prompt in prompts]
        for side, share in ((True, 0.25), (False, 0.75)):
            for part in range(1, parts + 1):
                expected = share / parts
                count = sum(h == side and p == part for h, p in zip(held_out, found, strict=True))
                deviation = (4000 * expected * (1 - expected)) ** 0.5
                assert abs(count - 4000 * expected) < 4 * deviation
