"""Layouts of data folders: what is read as training rows, what is held out, what is no data."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from gipo_megatron.data.batching import load_data
from gipo_megatron.data.config import DataConfig
from gipo_megatron.data.sources import open_sources
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.errors import UserError
from tests.data.fixtures import write_rows


def lay(root: Path, *paths: str) -> None:
    """Write files of one row, whose prompt is the path."""
    for path in paths:
        write_rows(root / path, [{"prompt": path}])


def read(root: Path, split: str) -> dict[str, list[str]]:
    sources = open_sources(str(root), [], split, "prompt")
    return {source.name: [row["prompt"] for _, row in source.rows] for source in sources}


@pytest.mark.parametrize(
    ("paths", "train", "held_out"),
    [
        (["train/0.jsonl", "test/0.jsonl"], ["train/0.jsonl"], ["test/0.jsonl"]),
        (["a/train/0.jsonl", "a/dev/0.jsonl"], ["a/train/0.jsonl"], ["a/dev/0.jsonl"]),
        (["train/a/0.jsonl", "test/a/0.jsonl"], ["train/a/0.jsonl"], ["test/a/0.jsonl"]),
        (["rows.jsonl", "held_out.jsonl"], ["rows.jsonl"], ["held_out.jsonl"]),
        (["r.train.jsonl", "r.eval.jsonl"], ["r.train.jsonl"], ["r.eval.jsonl"]),
        (["hh-train/0.jsonl", "hh-test/0.jsonl"], ["hh-train/0.jsonl"], ["hh-test/0.jsonl"]),
        (["0.jsonl", "test/0.jsonl", "valid/0.jsonl"], ["0.jsonl"], ["test/0.jsonl"]),
        (["a/b/c/0.jsonl", "a/b/test/0.jsonl"], ["a/b/c/0.jsonl"], ["a/b/test/0.jsonl"]),
        (["train.jsonl", "more.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
    ],
)
def test_layouts(tmp_path: Path, paths: list[str], train: list[str], held_out: list[str]) -> None:
    lay(tmp_path / "set", *paths)
    (name,) = read(tmp_path / "set", "train")
    assert name == ("a" if any("a/" in path for path in paths) else "set")
    assert read(tmp_path / "set", "train")[name] == train
    assert read(tmp_path / "set", "test")[name] == held_out
    unread = open_sources(str(tmp_path / "set"), [], "train", "prompt")[0].unread
    assert len(unread) == len(paths) - 2


def test_a_source_with_held_out_rows_only_is_left_out_of_training(tmp_path: Path) -> None:
    lay(tmp_path, "one/train.jsonl", "two/test.jsonl")
    assert read(tmp_path, "train") == {"one": ["one/train.jsonl"], "two": []}
    assert read(tmp_path, "test") == {"one": ["one/train.jsonl"], "two": ["two/test.jsonl"]}


def test_what_is_no_data(tmp_path: Path) -> None:
    lay(tmp_path, "rows.jsonl", ".ipynb_checkpoints/rows-checkpoint.jsonl", "__MACOSX/rows.jsonl")
    lay(tmp_path, "._rows.jsonl", "old~/rows.jsonl", "$RECYCLE.BIN/rows.jsonl", "rows.jsonl~")
    for name in ("Thumbs.db", "desktop.ini", "README.md", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "README.md").write_text("# Rows\n")
    for name in ("dataset_infos.json", "dataset_info.json", "about.json"):
        (tmp_path / name).write_text(json.dumps({"licence": "CC0"}, indent=1))
    (tmp_path / "above").symlink_to(tmp_path, target_is_directory=True)
    assert [*read(tmp_path, "train").values()] == [["rows.jsonl"]]


@pytest.mark.parametrize("name", ["rows.zip", "rows.tar.gz", "rows.tgz"])
def test_archives_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError) as raised:
            read(path, "train")
        assert name in str(raised.value) and "unpack" in raised.value.fix
    lay(tmp_path, "rows.jsonl")
    (source,) = open_sources(str(tmp_path), [], "train", "prompt")
    assert len(source.unread) == 1 and name in source.unread[0]


def saved(rows: int) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": f"{rows} {i}"} for i in range(rows)])


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    """A dictionary of splits; one split a folder; one data set; a dictionary as a source."""
    both = datasets.DatasetDict({"train": saved(3), "validation": saved(2)})
    both.save_to_disk(tmp_path / "both")
    assert [len(read(tmp_path / "both", split)["both"]) for split in ("train", "test")] == [3, 2]
    saved(4).save_to_disk(tmp_path / "apart" / "train")
    saved(5).save_to_disk(tmp_path / "apart" / "test")
    assert [len(read(tmp_path / "apart", split)["apart"]) for split in ("train", "test")] == [4, 5]
    saved(6).save_to_disk(tmp_path / "one")
    assert len(read(tmp_path / "one", "all")["one"]) == 6
    with pytest.raises(UserError, match="is marked test"):
        read(tmp_path / "apart" / "test", "train")
    assert {name: len(rows) for name, rows in read(tmp_path, "test").items()} == {
        "apart": 5,
        "both": 2,
        "one": 6,
    }
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="save_to_disk"):
        read(tmp_path / "one", "all")


HEADER = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "part_a*"}
  - {split: test, path: [part_b.jsonl, gone.jsonl]}
---
"""


def test_the_header_of_the_readme_marks_files(tmp_path: Path) -> None:
    lay(tmp_path / "set", "part_a1.jsonl", "part_a2.jsonl", "part_b.jsonl", "part_c.jsonl")
    (tmp_path / "set" / "README.md").write_text(HEADER)
    assert read(tmp_path / "set", "train") == {"set": ["part_a1.jsonl", "part_a2.jsonl"]}
    assert read(tmp_path / "set", "test") == {"set": ["part_b.jsonl"]}
    (tmp_path / "set" / "README.md").write_text("---\nconfigs: none\n---\n")
    with pytest.raises(UserError, match="unreadable header") as raised:
        read(tmp_path / "set", "train")
    assert raised.value.where.endswith("README.md")


@pytest.mark.parametrize("name", ["test.jsonl", "test/0000.jsonl"])
def test_a_file_marked_test_is_not_trained_on(tmp_path: Path, name: str) -> None:
    lay(tmp_path, name)
    with pytest.raises(UserError, match="no train file"):
        read(tmp_path / name, "train")
    assert [*read(tmp_path / name, "test").values()] == [[name]]


def test_no_held_out_rows_where_none_are_needed(tmp_path: Path) -> None:
    lay(tmp_path, "rows.jsonl")
    config = DataConfig(format="prompt", path=str(tmp_path), held_out=0.0)
    assert len(load_data(config, byte_tokenizer(), "train", 0, "prompt")) == 1
    assert not load_data(config, byte_tokenizer(), "test", 0, "prompt", needed=False).rows
    with pytest.raises(UserError, match="no test rows left of 0") as raised:
        load_data(config, byte_tokenizer(), "test", 0, "prompt")
    assert "run.eval_every=0" in raised.value.fix


def test_the_run_lists_files_rows_and_sides(tmp_path: Path) -> None:
    lay(tmp_path, "train.jsonl", "validation.jsonl", "test.jsonl")
    config = DataConfig(format="prompt", path=str(tmp_path))
    report = load_data(config, byte_tokenizer(), "train", 0, "prompt").report
    assert report[:2] == [
        f"read {tmp_path / 'train.jsonl'}: 1 rows, train",
        f"not read: {tmp_path / 'validation.jsonl'} (validation)",
    ]
