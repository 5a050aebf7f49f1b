"""Small files and tokenizers for the data tests, and where the real data are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


def write_rows(file: Path, rows: Iterable[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return file


def dialogue(*turns: str) -> str:
    """`h: text` and `a: text` as an HH transcript."""
    heads = {"h": "\n\nHuman: ", "a": "\n\nAssistant: "}
    return "".join(heads[turn[0]] + turn[3:] for turn in turns)
