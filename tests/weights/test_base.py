"""Which folders of weights are one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gipo_megatron.weights.base import base_at
from gipo_megatron.weights.hf_files import save_tensors

NAMES = [f"model.layers.{i}.weight" for i in range(8)]


def write(folder: Path, changed: str = "") -> Path:
    """Eight matrices of 1 MiB, so that a file has more bytes than are read; one may be moved."""
    folder.mkdir()
    tensors = {name: torch.full((512, 512), float(i)) for i, name in enumerate(NAMES)}
    if changed:
        tensors[changed] = tensors[changed] + 0.5
    save_tensors(folder / "model.safetensors", tensors)
    return folder


def test_a_copy_is_the_same_model_wherever_it_is(tmp_path: Path) -> None:
    one, other = base_at(write(tmp_path / "a")), base_at(write(tmp_path / "b"))
    assert one == other and one.source != other.source


@pytest.mark.parametrize("name", NAMES)
def test_another_value_of_any_matrix_is_another_model(name: str, tmp_path: Path) -> None:
    """As merged adapters of one layer make it: names, shapes and the other matrices stay."""
    assert base_at(write(tmp_path / "a")) != base_at(write(tmp_path / "b", name))
