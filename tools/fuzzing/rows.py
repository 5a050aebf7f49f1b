"""Data files: rows of every schema with values that no schema has, in every format that is read,
then damaged bytes."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from tools.fuzzing.case import Case
from tools.fuzzing.values import damaged, hostile, mutated

Row = dict[str, Any]
HEAD = "\n\nHuman: {q}\n\nAssistant:"


def said(role: str, text: Any) -> Row:
    return {"role": role, "content": text}


def chat(q: Any, a: Any) -> list[Row]:
    return [said("user", q), said("assistant", a)]


def post(text: str) -> Row:
    return {"subreddit": "s", "title": "t", "post": text}


def shapes(q: str, a: str, b: str) -> dict[str, list[Row]]:
    """Return a row of every documented schema, by the data.format that reads it."""
    head = HEAD.format(q=q)
    human, gpt = {"from": "human", "value": q}, {"from": "gpt", "value": a}
    return {
        "sft": [
            {"prompt": q, "response": a, "score": 1},
            {"prompt": [said("user", q)], "completion": [said("assistant", a)]},
            {"instruction": q, "input": "", "output": a},
            {"messages": [said("system", "s"), *chat(q, a)], "source": "web"},
            {"messages": json.dumps(chat(q, a))},
            {"messages": repr(chat(q, a))},
            {"messages": chat([{"type": "text", "text": q}], a)},
            {"conversations": [human, gpt], "split": "train"},
            {**post(q), "summary": a},
        ],
        "preference": [
            {"prompt": q, "chosen": a, "rejected": b},
            {"chosen": chat(q, a), "rejected": chat(q, b)},
            {"prompt": q, "chosen": chat(q, a), "rejected": chat(q, b)},
            {"chosen": f"{head} {a}", "rejected": f"{head} {b}"},
            {"prompt": head, "chosen": a, "rejected": b},
            {"conversations": [human], "chosen": gpt, "rejected": {"from": "gpt", "value": b}},
            {"info": post(q), "summaries": [{"text": a}, {"text": b}], "choice": 0},
        ],
        "prompt": [
            {"prompt": q},
            {"messages": [said("user", q)]},
            {"prompt": head, "split": "dev"},
        ],
    }


TEXTS = st.text(max_size=9) | st.sampled_from(
    ["", " ", "a", "[1]", "[[[", "[{}]", "\0", "\ud800", HEAD, "<|endoftext|>", "é" * 40, "{" * 200]
)
WORDS = [
    ["data.columns={prompt: chosen}"], ["data.columns={response: nope}"], ["data.held_out=0"],
    ["data.held_out=1"], ["data.part=1/2"], ["data.part=9/9"], ["data.allow_drops=true"],
    ["data.template=chat"], ["data.template=chatml"], ["data.template='{{ messages }}'"],
    ["data.template='{% for'"], ["data.max_length=8", "data.max_response=4"], ["data.source=[web]"],
    ["data.columns={source: source}"], ["data.columns={nope: a}"], ["data.template=plain"],
    ["data.template='{{ 1 // 0 }}'"], ["data.template=hh"], *[["out=out"]] * 6, *[[]] * 12,
]  # fmt: skip


@st.composite
def rows_of_a_format(draw: st.DrawFn, format: str) -> list[Any]:
    """Draw five rows or more of one schema, some of them changed."""
    count = draw(st.integers(5, 9))
    number = draw(st.integers(0, len(shapes("", "", "")[format]) - 1))
    rows: list[Any] = []
    for i in range(count):
        q, a, b = f"q{i} {draw(TEXTS)}", f"a {draw(TEXTS)}", f"b {draw(TEXTS)}"
        kind = draw(st.sampled_from(["good", "good", "good", "mutated", "hostile texts"]))
        if kind == "hostile texts":
            q, a, b = draw(TEXTS), draw(TEXTS), draw(TEXTS)
        row = shapes(q, a, b)[format][number]
        if kind == "mutated":
            row, _ = draw(mutated(row))
        rows.append(row)
    if draw(st.integers(0, 19)) == 0:
        rows[draw(st.integers(0, count - 1))] = draw(hostile())
    return rows


# ------------------------------------------------------------------------------------- as files


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_list(rows: list[Any]) -> bytes:
    return json.dumps(rows).encode()


def as_csv(rows: list[Any]) -> bytes:
    """Return a table whose cells are texts; other values as JSON."""
    dicts = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(str(name) for row in dicts for name in row))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for row in dicts:
        cells = [row.get(name) for name in names]
        writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
    return text.getvalue().encode("utf-8", "surrogatepass")


def table(rows: list[Any]) -> pa.Table:
    """Return columns, each with the type of its first rows; what does not fit becomes null."""
    dicts = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(str(name) for row in dicts for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in dicts]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, UnicodeError, OverflowError):
            columns[name] = pa.array([_plain(value) for value in values])
    return pa.table(columns)


def _plain(value: Any) -> str | None:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


# columns that JSON has no types for
COLUMNS: list[pa.Array] = [
    pa.array([b"\xff", b"a", b"", b"a", b"b"]),
    pa.array([0, 1, 2, 3, None], pa.timestamp("ns", "UTC")),
    pa.array([0, 1, 2, 3, None], pa.date32()),
    pa.array([0, 1, 2, 3, None], pa.duration("ns")),
    pa.array(["1.5", "2", None, "3", "4"]).cast(pa.decimal128(9, 2)),
    pa.array(["a", "b", "a", None, "a"]).dictionary_encode(),
    pa.array(["a", "b", "a", None, "a"], pa.large_string()),
    pa.array([None] * 5),
    pa.array([[("a", 1)], [], None, [("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    pa.array([2.5, float("nan"), float("inf"), None, -0.0], pa.float32()),
    pa.array([[1.0, 2.0]] * 5, pa.list_(pa.float16(), 2)),
]


@st.composite
def tables(draw: st.DrawFn, rows: list[Any]) -> pa.Table:
    """Draw a table, of which one column may have a type that no text has."""
    found = table(rows)
    if draw(st.booleans()) and found.num_columns and found.num_rows >= 5:
        place = draw(st.integers(0, found.num_columns - 1))
        column = draw(st.sampled_from(COLUMNS))
        found = found.slice(0, 5).set_column(place, found.column_names[place], column)
    return found


def as_parquet(found: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(found, sink)
    return sink.getvalue()


def as_arrow(found: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, found.schema) as writer:
        writer.write_table(found)
    return sink.getvalue()


PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}
PLAIN = {"jsonl": jsonl, "json": as_list, "csv": as_csv}


@st.composite
def cases(draw: st.DrawFn, reader: str) -> Case:
    """A file of `reader`, alone or in a folder."""
    format = draw(st.sampled_from(["sft", "preference", "prompt"]))
    rows = draw(rows_of_a_format(format))
    if reader in PLAIN:
        content = PLAIN[reader](rows)
    else:
        found = draw(tables(rows))
        try:
            content = as_parquet(found) if reader == "parquet" else as_arrow(found)
        except pa.ArrowException:  # no file of it exists
            content = as_parquet(table([{"prompt": "a"}]))
    if draw(st.integers(0, 4)) == 0:
        content = draw(damaged(content))
    packing = draw(st.sampled_from(["", "", "", *PACKED])) if reader != "arrow" else ""
    content = PACKED[packing](content)
    if packing and draw(st.integers(0, 2)) == 0:
        content = draw(damaged(content))
    name = draw(st.sampled_from(["rows", "train", "data/rows", "é b"]))
    file = f"d/{name}.{reader}{packing}"
    path = draw(st.sampled_from([file, "d"]))
    words = draw(st.sampled_from(WORDS))
    start = ("prepare-data", f"data.path={path}", f"data.format={format}")
    writes = "out" if "out=out" in words else ""
    return Case((*start, *words), {file: content}, (file, path, "data."), writes)


READERS = ("jsonl", "json", "csv", "parquet", "arrow")
