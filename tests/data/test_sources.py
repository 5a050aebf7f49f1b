from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from gipo_megatron.data.sources import Source, open_sources
from gipo_megatron.errors import UserError
from tests.data.fixtures import write_rows

ROWS = [
    {"prompt": "a\u2028b", "chosen": "x", "rejected": "y"},
    {"prompt": "c", "chosen": "z", "rejected": 'w, "q"\nline'},
]


def rows_of(
    path: Path, names: list[str] | None = None, split: str = "all", format: str = "prompt"
) -> dict[str, list[dict[str, Any]]]:
    return {
        source.name: [row for _, row in source.rows]
        for source in open_sources(str(path), names or [], split, format)
    }


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_bytes(json.dumps(ROWS, indent=1).encode())
    (tmp_path / "d.json").write_bytes(lines.encode())
    with open(tmp_path / "e.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "f.parquet")
    files = sorted(tmp_path.iterdir())
    for file in files:
        assert list(rows_of(file).values()) == [ROWS], file.name
    assert len(files) == 6


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    """U+2028, U+0085 and a lone carriage return stand inside a row."""
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}'.encode())
    assert rows_of(file) == {"a": [{"prompt": "a\u2028b\u0085c"}, {"prompt": "d"}]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "x"', "unreadable JSON"),
        (b'["x"]', "a JSON list, not an object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'{"prompt": "ok"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=said) as raised:
        rows_of(file)
    assert raised.value.where == f"{file} line 3"


def test_a_csv_row_of_another_length_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,response\na,b\nc\n")
    with pytest.raises(UserError, match="another length") as raised:
        rows_of(file)
    assert raised.value.where == f"{file} line 3"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(
        gzip.compress(b'{"prompt": "x"}\n' * 1000)[:-9] if name.endswith("gz") else b"PAR1 nothing"
    )
    with pytest.raises(UserError, match="cannot read the file") as raised:
        rows_of(file)
    assert str(file) in raised.value.where


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="no rows"):
        rows_of(tmp_path)


def test_nothing_there_and_nothing_in_it(tmp_path: Path) -> None:
    cases = {
        "": "data.path is empty",
        str(tmp_path): "no data files",
        str(tmp_path / "x"): "nothing at",
        "missing.jsonl": "nothing at",
    }
    for path, said in cases.items():
        with pytest.raises(UserError, match=said):
            open_sources(path, [], "train", "prompt")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="unknown kind of file"):
        open_sources(str(tmp_path / "notes.txt"), [], "train", "prompt")


def test_folders_are_sources_and_their_files_splits(tmp_path: Path) -> None:
    for name, split in (
        ("one", "train"),
        ("one", "test"),
        ("two", "train-00000-of-00001"),
        ("two", "validation"),
        ("three", "trainee"),
    ):
        write_rows(tmp_path / name / f"{split}.jsonl", [{"prompt": f"{name} {split}"}])
    write_rows(tmp_path / "four" / "data" / "train.jsonl", [{"prompt": "four"}])

    def texts(split: str, names: list[str]) -> dict[str, list[str]]:
        return {
            source: [row["prompt"] for row in rows]
            for source, rows in rows_of(tmp_path, names, split).items()
        }

    assert texts("train", ["one", "two"]) == {
        "one": ["one train"],
        "two": ["two train-00000-of-00001"],
    }
    assert texts("test", ["two", "one"]) == {"one": ["one test"], "two": ["two validation"]}
    assert sorted(texts("all", [])) == ["four", "one", "three", "two"]
    own = {
        source.name: source.split for source in open_sources(str(tmp_path), [], "train", "prompt")
    }
    assert own == {"four": False, "one": True, "three": False, "two": True}
    with pytest.raises(UserError, match="no source five") as raised:
        open_sources(str(tmp_path), ["five"], "train", "prompt")
    assert "four, one, three, two" in raised.value.fix


def test_only_test_files_are_no_training_data(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", [{"prompt": "x"}])
    assert len(open_sources(str(tmp_path), [], "test", "prompt")) == 1
    with pytest.raises(UserError, match="no train file"):
        open_sources(str(tmp_path), [], "train", "prompt")


def test_a_hub_that_is_not_there_says_how_to_give_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    with pytest.raises(UserError, match="cannot be reached") as raised:
        open_sources("nobody/nothing", [], "train", "prompt")
    assert "data.path=FOLDER" in raised.value.fix


def from_hub(
    monkeypatch: pytest.MonkeyPatch, configurations: dict[str, list[str]], split: str
) -> list[Source]:
    """Open a hub made by hand: {configuration: its splits}, each row the names of both."""

    def load(path: str, name: str = "default") -> datasets.DatasetDict:
        rows = {
            key: datasets.Dataset.from_list([{"prompt": f"{name} {key}"}])
            for key in configurations[name]
        }
        return datasets.DatasetDict(rows)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: [*configurations])
    monkeypatch.setattr(datasets, "load_dataset", load)
    return open_sources("o/set", [], split, "prompt")


def texts(sources: list[Source]) -> dict[str, list[str]]:
    return {source.name: [row["prompt"] for _, row in source.rows] for source in sources}


def test_splits_of_a_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test wins over validation; without a name, one split is all training data."""
    hub = {"default": ["train_a", "validation", "train_b", "test"]}
    read = {split: from_hub(monkeypatch, hub, split) for split in ("train", "test", "all")}
    assert texts(read["train"]) == {"set": ["default train_a", "default train_b"]}
    assert texts(read["test"]) == {"set": ["default test"]}
    assert len(texts(read["all"])["set"]) == 4
    assert [read[split][0].split for split in read] == [True, True, False]
    assert read["train"][0].unread == ("set validation (validation)",)
    (alone,) = from_hub(monkeypatch, {"default": ["everything"]}, "test")
    assert not alone.split and [where for where, _ in alone.rows] == ["set everything row 1"]
    with pytest.raises(UserError, match="set validation is marked validation"):
        from_hub(monkeypatch, {"default": ["validation"]}, "train")


def test_hub_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a default all are read, and a name that marks a split marks its rows."""
    hub = {"train": ["train"], "held-out": ["train"], "extra": ["train"]}
    assert texts(from_hub(monkeypatch, hub, "train")) == {
        "extra": ["extra train"],
        "set": ["train train"],
    }
    assert texts(from_hub(monkeypatch, hub, "test"))["set"] == ["held-out train"]


def a_row(prompt: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [prompt]})


def test_a_hub_source_is_a_configuration_or_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub made by hand: `one` is a configuration, `two` a folder, `gone` neither."""

    def load(
        name: str, configuration: str | None = None, data_dir: str | None = None
    ) -> dict[str, datasets.Dataset]:
        if data_dir == "gone":
            raise FileNotFoundError("no such folder")
        return {"train": a_row(f"{name} {configuration} {data_dir}")}

    # the local cache: nobody is asked whether the hub is there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["one"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    read = {
        source.name: [row["prompt"] for _, row in source.rows]
        for source in open_sources("o/set", ["two", "one"], "train", "prompt")
    }
    assert read == {"one": ["o/set one None"], "two": ["o/set None two"]}
    assert [source.name for source in open_sources("o/set", [], "train", "prompt")] == ["set"]
    with pytest.raises(UserError, match="cannot load 'o/set' from the hub: no such folder"):
        open_sources("o/set", ["gone"], "train", "prompt")


def openai_layout(folder: Path) -> Path:
    for name in ("comparisons", "posts"):
        write_rows(folder / name / "train.jsonl", [{"prompt": name}])
    return folder


@pytest.mark.parametrize(
    ("format", "read"), [("preference", "comparisons"), ("sft", "posts"), ("prompt", "posts")]
)
def test_openai_keeps_posts_and_comparisons_apart(tmp_path: Path, format: str, read: str) -> None:
    """One data.path serves every stage: data.format says which of the two is read; a name given by
    the user wins."""
    folder = openai_layout(tmp_path)
    assert list(rows_of(folder, format=format)) == [read]
    assert list(rows_of(folder, ["posts", "comparisons"], format=format)) == [
        "comparisons",
        "posts",
    ]


def test_openai_comparisons_without_posts(tmp_path: Path) -> None:
    write_rows(tmp_path / "comparisons" / "train.jsonl", [{"prompt": "x"}])
    with pytest.raises(
        UserError, match=r"data\.format sft reads OpenAI's posts; there are only comparisons"
    ) as raised:
        rows_of(tmp_path, format="sft")
    assert "data.format=preference" in raised.value.fix


def test_openai_configurations_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As openai/summarize_from_feedback names them, by hand."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["axis", "comparisons"])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, configuration: {"train": a_row(configuration)}
    )
    sources = open_sources("openai/summarize_from_feedback", [], "train", "preference")
    assert [(source.name, [row["prompt"] for _, row in source.rows]) for source in sources] == [
        ("comparisons", ["comparisons"])
    ]
    with pytest.raises(UserError, match="there are only axis, comparisons"):
        open_sources("openai/summarize_from_feedback", [], "train", "sft")
