"""Atomic writes and JSON Lines: what a kill, a full disk or a missing permission leaves behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from gipo_megatron import files
from gipo_megatron.errors import UserError

ROWS = [{"a": 1, "text": "Ä\u2028\n"}, {"a": 2.5, "text": "\ud800"}, {"a": None}]


def test_a_kill_at_any_byte_loses_the_torn_line_only(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    files.write_jsonl(file, ROWS)
    content = file.read_bytes()
    assert content.count(b"\n") == 3
    for size in range(len(content)):
        file.write_bytes(content[:size])
        kept = [row for _, row in files.read_jsonl(file)]
        assert kept == ROWS[: content[:size].count(b"\n")]
        files.append_jsonl(file, ROWS[len(kept) :], sync=size % 2 == 0)
        assert file.read_bytes() == content
    assert size > 60


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert list(files.read_jsonl(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize(
    ("line", "what"), [(b"{oops\n", "not JSON"), (b"[1]\n", "a JSON list"), (b"\xff\n", "not JSON")]
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n\n' + line + b'{"a": 2}\n')
    with pytest.raises(UserError, match=what) as raised:
        list(files.read_jsonl(file, "do this"))
    assert raised.value.where == f"{file}:3" and raised.value.fix == "do this"


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "value.json"
    for value in ({"é": 1}, [2]):
        files.write_json(file, value)
        assert json.loads(file.read_bytes()) == value
    with pytest.raises(ValueError):
        files.write_json(file, float("nan"))
    assert json.loads(file.read_bytes()) == [2]
    assert [path.name for path in file.parent.iterdir()] == ["value.json"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "old.txt"
    files.write_text(file, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left") as raised:
        files.write_text(file, "new")
    assert raised.value.where == str(file) and "free some space" in raised.value.fix
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (files.write_jsonl, files.append_jsonl):
        with pytest.raises(UserError, match="cannot write") as raised:
            write(tmp_path / "file" / "rows.jsonl", ROWS)
        assert str(tmp_path / "file") in raised.value.where
