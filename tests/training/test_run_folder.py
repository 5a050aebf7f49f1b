"""What a run prints and leaves besides numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from gipo_megatron import environment
from gipo_megatron.data.batching import load_data
from gipo_megatron.data.tokenizer import byte_tokenizer
from gipo_megatron.training import run_folder
from tests.recipe.helpers import small


def test_a_run_prints_each_note_and_its_environment_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small(tmp_path)
    rows = load_data(recipe.data, byte_tokenizer(), "test", 0, "prompt")
    run_folder.announce(
        recipe,
        1,
        "started",
        rows,
        rows,
        ["a was trained so", "b was trained so", "a was trained so"],
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "was trained" in line] == [
        "  warning: a was trained so",
        "  warning: b was trained so",
    ]
    assert [line for line in lines if "environment:" in line] == [f"  {environment.line()}"]
