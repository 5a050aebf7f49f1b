"""A recipe's whole run, as launch/train.py does it, and what it logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from gipo_megatron.files import read_jsonl
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.recipe.compose import compose
from gipo_megatron.training import run_folder
from gipo_megatron.training.runner import train_on

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
Rows = list[dict[str, Any]]


def run(mesh: Mesh, words: list[str]) -> Rows:
    """To its end, but for the report: its figures take longer than a tiny run's steps. Returns
    metrics.jsonl."""
    recipe = compose(words, RECIPES)
    with patch.object(run_folder, "close_run"):
        train_on(mesh, recipe)
    return [row for _, row in read_jsonl(Path(recipe.run.dir) / "metrics.jsonl")]
