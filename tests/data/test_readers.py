"""Every documented schema against a reference of a few lines, and files that are not as they
should be."""

from __future__ import annotations

import bz2
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gipo_megatron.data.batching import load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.readers import read_file
from gipo_megatron.data.schemas import LAST_ONLY
from gipo_megatron.data.sources import open_sources
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.errors import UserError
from tests.data.fixtures import write_rows

Text = str | None
Row = dict[str, Any]


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def reply(text: Any) -> Row:
    return {"content": text, "role": "assistant"}


def human(text: Any, who: str = "human") -> Row:
    return {"from": who, "value": text}


def part(text: Any) -> list[Row]:
    return [{"type": "text", "text": text}]


# name -> data.format, a row of question, answer and worse answer
SCHEMAS: dict[str, tuple[str, Callable[[Text, Text, Text], Row]]] = {
    "text": ("sft", lambda q, a, b: {"prompt": q, "response": a, "score": 1}),
    "trl": ("sft", lambda q, a, b: {"prompt": [user(q)], "completion": [reply(a)]}),
    "alpaca": ("sft", lambda q, a, b: {"instruction": q, "input": "", "output": a}),
    "chat": ("sft", lambda q, a, b: {"messages": [user(q), reply(a)], "prompt": q}),
    "parts": ("sft", lambda q, a, b: {"messages": [user(part(q)), reply(part(a))]}),
    "sharegpt": ("sft", lambda q, a, b: {"conversations": [human(q), human(a, "gpt")]}),
    "json": ("sft", lambda q, a, b: {"messages": json.dumps([user(q), reply(a)])}),
    "python": ("sft", lambda q, a, b: {"messages": repr([user(q), reply(a)])}),
    "pairs": ("preference", lambda q, a, b: {"prompt": q, "chosen": a, "rejected": b}),
    "chat pairs": (
        "preference",
        lambda q, a, b: {"chosen": [user(q), reply(a)], "rejected": [user(q), reply(b)]},
    ),
    "text beside chats": (
        "preference",
        lambda q, a, b: {
            "prompt": q,
            "chosen": [user(q), reply(a)],
            "rejected": [user(q), reply(b)],
        },
    ),
    "chat beside chats": (
        "preference",
        lambda q, a, b: {
            "prompt": [user(q)],
            "chosen": [user(q), reply(a)],
            "rejected": [reply(b)],
        },
    ),
    "sharegpt pairs": (
        "preference",
        lambda q, a, b: {
            "conversations": [human(q)],
            "chosen": human(a, "gpt"),
            "rejected": human(b, "gpt"),
        },
    ),
}
TEXTS = st.one_of(st.none(), st.text(max_size=8), st.sampled_from(["a", " ", "\u2028é", "[1]"]))


def reference(rows: list[tuple[Text, Text, Text]], pairs: bool) -> list[tuple[str, ...]]:
    """Rows whose texts are there and not blank, whose answers differ, each once."""
    kept: list[tuple[str, ...]] = []
    for row in rows:
        texts = tuple(text for text in row[: 3 if pairs else 2] if text and text.strip())
        good = len(texts) == (3 if pairs else 2) and texts not in kept
        if good and not (pairs and texts[1].strip() == texts[2].strip()):
            kept.append(texts)
    return kept


@pytest.mark.parametrize("name", SCHEMAS)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=12), seed=st.integers())
@settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_rows_against_the_reference(
    tmp_path: Path, name: str, rows: list[tuple[Text, Text, Text]], seed: int
) -> None:
    format, make = SCHEMAS[name]
    shuffle = random.Random(seed)
    made = [list(make(*row).items()) for row in rows]
    for row in made:
        shuffle.shuffle(row)
    file = write_rows(tmp_path / "rows.jsonl", map(dict, made))
    config = DataConfig(
        format=format, path=str(file), max_length=4096, max_response=64, allow_drops=True
    )
    expected = reference(rows, format == "preference")
    if not expected:
        with pytest.raises(UserError, match="no all rows left"):
            load_data(config, byte_tokenizer(), "all", 0, format)
        return
    data = load_data(config, byte_tokenizer(), "all", 0, format)
    assert [(row.prompt[-1].text, *row.responses) for row in data.rows] == expected
    assert all(len(row.prompt) == 1 for row in data.rows)
    assert data._tally.read == len(rows) == data._tally.files.total()
    assert sum(data._tally.dropped.values()) == len(rows) - len(expected)


# -------------------------------------------------------------------------------- reasons of drops


def load(path: Path, format: str = "sft", split: str = "all", **keys: Any) -> Any:
    config = DataConfig(format=format, path=str(path), **keys)
    return load_data(config, byte_tokenizer(), split, 0, format)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
BAD = {
    "calls a tool": [user("q"), CALL],
    "the role 'tool'": [user("q"), {"role": "tool", "content": "4"}, reply("a")],
    "the role 'bard'": [human("q"), human("a", "bard")],
    "type 'image_url'": [user([{"type": "image_url", "image_url": {}}, *part("q")]), reply("a")],
}


@pytest.mark.parametrize("said", BAD)
def test_messages_that_cannot_be_learnt(tmp_path: Path, said: str) -> None:
    good = [{"messages": [user(f"q{i}"), reply("a")]} for i in range(2)]
    data = load(write_rows(tmp_path / "a.jsonl", [*good, {"messages": BAD[said]}]))
    assert len(data) == 2 and any(
        line.startswith("dropped 1:") and said in line for line in data.report
    )


def test_more_than_half_dropped_is_an_error(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "response": "a" if i < 4 else ["", 7, None][i % 3]} for i in range(10)
    ]
    file = write_rows(tmp_path / "a.jsonl", [*rows, *rows[:1] * 20])
    assert len(load(file)) == 4  # repeats count among the rows, not among the lost ones
    write_rows(file, rows)
    with pytest.raises(UserError, match="6 of 10 rows are dropped, more than half") as raised:
        load(file)
    fix = raised.value.fix.splitlines()
    assert len(fix) == 4 and "data.allow_drops=true" in fix[-1]
    assert any("dropped 2: empty response" in line and "line 7" in line for line in fix)
    assert any("response is neither text nor a chat, but int" in line for line in fix)
    assert len(load(file, allow_drops=True)) == 4


def test_a_chat_that_is_not_the_prompts(tmp_path: Path) -> None:
    other = {"prompt": "p", "chosen": [user("x"), reply("a")], "rejected": [user("x"), reply("b")]}
    good = {"prompt": "x", "chosen": [user("x"), reply("a")], "rejected": [reply("b")]}
    data = load(write_rows(tmp_path / "a.jsonl", [good, other]), "preference")
    assert any("does not begin with the prompt" in line for line in data.report)


def test_the_prompt_may_be_a_later_turn_and_a_system_turn_stands_beside(tmp_path: Path) -> None:
    system = {"role": "system", "content": "S"}
    start = [system, user("hi"), reply("hello"), user("x")]
    rows = [
        {"prompt": "x", "chosen": [*start, reply("a")], "rejected": [*start, reply("b")]},
        {"prompt": start, "chosen": [*start[1:], reply("a")], "rejected": [reply("b")]},
    ]
    for row in rows:
        (read,) = load(write_rows(tmp_path / "a.jsonl", [row]), "preference").rows
        assert [turn.text for turn in read.prompt] == ["S", "hi", "hello", "x"]
        assert read.responses == ("a", "b")


def test_a_transcript_beside_whole_transcripts(tmp_path: Path) -> None:
    prompt = "\n\nHuman: q\n\nAssistant:"
    row = {"prompt": prompt, "chosen": f"{prompt} a", "rejected": f"{prompt} b"}
    assert load(write_rows(tmp_path / "a.jsonl", [row]), "preference").rows[0].responses == (
        " a",
        " b",
    )


def test_a_reply_in_json_stays_text(tmp_path: Path) -> None:
    replies = ['{"from": "Rome", "to": "Oslo"}', '[{"role": "admin"}]', "[1, 2]", '["user"]']
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "response": r} for r in replies])
    assert [row.responses[0] for row in load(file).rows] == replies


def test_of_several_turns_the_last_is_learnt_and_the_run_names_it(tmp_path: Path) -> None:
    chat = [user("a"), reply("b"), user("c"), reply("d")]
    data = load(write_rows(tmp_path / "a.jsonl", [{"messages": chat}]))
    assert data.rows[0].responses == ("d",)
    assert any(LAST_ONLY in line for line in data.report)


# -------------------------------------------------------------------------------------- columns


def test_mapped_columns_win(tmp_path: Path) -> None:
    row = {
        "prompt": "no",
        "response": "no",
        "q": "yes",
        "a": "yes!",
        "messages": "no",
        "input": "i",
    }
    file = write_rows(tmp_path / "a.jsonl", [row])
    data = load(file, columns={"prompt": "q", "response": "a"})
    assert (data.rows[0].prompt[0].text, data.rows[0].responses) == ("yes", ("yes!",))
    assert data.rows[0].extras == {"input": "i"}
    assert "not read: prompt, response, messages, input" in data.report
    chat = write_rows(tmp_path / "b.jsonl", [{**row, "chat": [user("u"), reply("v")]}])
    assert load(chat, columns={"messages": "chat"}).rows[0].responses == ("v",)
    with pytest.raises(UserError, match="no column 'none'"):
        load(file, columns={"prompt": "q", "response": "none"})


@pytest.mark.parametrize("columns", [{}, {"prompt": "instruction", "response": "output"}])
def test_alpacas_input_is_part_of_the_prompt(tmp_path: Path, columns: dict[str, str]) -> None:
    rows = [{"instruction": "Translate.", "input": more, "output": "a"} for more in ("word", "", 5)]
    data = load(write_rows(tmp_path / "a.jsonl", rows), columns=columns)
    assert [row.prompt[0].text for row in data.rows] == [
        "Translate.\n\nword",
        "Translate.",
        "Translate.\n\n5",
    ]
    assert not any("not read" in line for line in data.report)


def test_every_file_has_its_own_schema(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    write_rows(tmp_path / "b.jsonl", [{"messages": [user("u"), reply("v")]}])
    data = load(tmp_path)
    assert [row.responses for row in data.rows] == [("r",), ("v",)]
    assert data.report[:2] == [f"read {tmp_path / n}.jsonl: 1 rows, all rows" for n in "ab"]


def test_the_column_split_marks_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{split}{i}", "response": "a", "split": split}
        for i in range(9)
        for split in ("train", "test", "dev")
    ]
    file = write_rows(tmp_path / "a.jsonl", rows)
    for split, marks in (("train", {"train"}), ("test", {"test", "dev"})):
        assert {row.extras["split"] for row in load(file, split=split).rows} == marks
    file = write_rows(tmp_path / "b" / "train.jsonl", rows)
    write_rows(tmp_path / "b" / "test.jsonl", [{"prompt": "x", "response": "a"}])
    data = load(tmp_path / "b", split="train", allow_drops=True)
    assert len(data) == 9 and "dropped 18: a row that its column split marks" in str(data.report)


# ---------------------------------------------------------------------------------------- files

LINES = b"".join(
    json.dumps({"prompt": f"q{i}", "id": 2**70 + i}).encode() + b"\n" for i in range(9)
)
ZSTD = pyarrow.compress(LINES, codec="zstd", asbytes=True)


def test_compressed_files(tmp_path: Path) -> None:
    for name, content in (
        ("gz", gzip.compress(LINES)),
        ("bz2", bz2.compress(LINES)),
        ("zst", ZSTD),
    ):
        file = tmp_path / f"rows.jsonl.{name}"
        file.write_bytes(content)
        rows = [row for _, row in read_file(file)]
        assert rows[8] == {"prompt": "q8", "id": 2**70 + 8} and len(rows) == 9


@pytest.mark.parametrize("name", ["jsonl.gz", "jsonl.zst", "jsonl.bz2", "parquet", "arrow"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    """A byte changed, an end lost, something else under the name."""
    rows = datasets.Dataset.from_list([{"prompt": f"q{i}" * 50} for i in range(99)])
    if name == "parquet":
        rows.to_parquet(tmp_path / "a.parquet")
        good = (tmp_path / "a.parquet").read_bytes()
    elif name == "arrow":
        rows.save_to_disk(tmp_path / "a")
        good = next((tmp_path / "a").glob("*.arrow")).read_bytes()
    else:
        pack = {"gz": gzip.compress, "bz2": bz2.compress}
        good = pack[name[6:]](LINES) if name[6:] in pack else ZSTD
    file = tmp_path / f"rows.{name}"
    for bad in (good[: len(good) // 2], b"something else" * 9, good[:40] + b"\xff" * 30):
        file.write_bytes(bad)
        with pytest.raises(UserError) as raised:
            [*open_sources(str(file), [], "all", "prompt")[0].rows]
        assert str(file) in raised.value.where


@pytest.mark.parametrize("name", ["a.json", "b.json", "c.jsonl", "d.csv"])
def test_a_byte_order_mark_is_nothing(tmp_path: Path, name: str) -> None:
    content = {"a": '[{"prompt": "é"}]', "d": "prompt\né\n"}.get(name[0], '{"prompt": "é"}\n')
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    assert [row for _, row in read_file(tmp_path / name)] == [{"prompt": "é"}]
    (tmp_path / name).write_bytes(content.encode("utf-16"))
    with pytest.raises(UserError, match=r"(UTF|utf)-8"):
        load(tmp_path / name, "prompt")


def test_long_fields_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt\n{'x' * 200_000}\n")
    ((_, row),) = read_file(tmp_path / "a.csv")
    assert len(row["prompt"]) == 200_000


@pytest.mark.parametrize("content", ["[" * 100_000, '{"id": ' + "9" * 5000 + "}"])
def test_json_beyond_the_parser(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError) as raised:
        load(tmp_path / "a.jsonl", "prompt")
    assert "a.jsonl" in raised.value.where
