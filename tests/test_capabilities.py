"""Every refusal of FP8, on machines that are not here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gipo_megatron import capabilities
from gipo_megatron.capabilities import Apex, Capabilities, GpuInfo
from gipo_megatron.errors import UserError
from tests import broken_transformer_engine

H100 = GpuInfo("NVIDIA H100 80GB HBM3", (9, 0), 79.6)
L4 = GpuInfo("NVIDIA L4", (8, 9), 22.5)
A100 = GpuInfo("NVIDIA A100-SXM4-80GB", (8, 0), 79.3)
HOPPER = Capabilities(
    "3.12.3",
    "2.11.0+cu130",
    cuda="13.0",
    nccl="2.28.9",
    gpus=(H100,) * 8,
    transformer_engine="2.11.0",
)


@pytest.mark.parametrize(
    ("change", "recipe", "words"),
    [
        ({}, "delayed", ""),
        ({}, "tensorwise", ""),
        ({}, "blockwise", ""),
        ({"gpus": ()}, "tensorwise", "no CUDA device"),
        (
            {"gpus": (H100, A100)},
            "delayed",
            "A100-SXM4-80GB has compute capability 8.0; delayed needs compute capability 8.9",
        ),
        ({"gpus": (L4,)}, "tensorwise", ""),
        (
            {"gpus": (L4,)},
            "blockwise",
            "L4 has compute capability 8.9; blockwise needs an H100-class GPU",
        ),
        ({"cuda": "12.8"}, "blockwise", "CUDA 12.8; blockwise needs 12.9"),
        ({"cuda": "12.8"}, "tensorwise", ""),
        ({"cuda": "12.10"}, "blockwise", ""),
        ({"cuda": "11.8"}, "delayed", "CUDA 11.8; delayed needs 12.1"),
        ({"transformer_engine": None}, "delayed", "Transformer Engine is not installed"),
        ({"transformer_engine": "2.8.1"}, "tensorwise", "2.8.1 is too old: at least 2.9"),
        ({"transformer_engine": "2.9.0.dev0+abc"}, "tensorwise", ""),
    ],
)
def test_obstacles(change: dict, recipe: str, words: str) -> None:
    here = replace(HOPPER, **change)
    obstacle = capabilities.fp8_obstacle(recipe, here)
    assert words in obstacle if words else obstacle == ""
    if words:
        with pytest.raises(UserError, match=r"precision\.fp8 is") as error:
            capabilities.check_fp8(recipe, here)
        assert words in str(error.value) and "none" in error.value.fix
    else:
        capabilities.check_fp8(recipe, here)


def test_the_fix_names_a_recipe_that_runs() -> None:
    with pytest.raises(UserError) as error:
        capabilities.check_fp8("blockwise", replace(HOPPER, cuda="12.8"))
    assert error.value.fix.startswith("set precision.fp8 to tensorwise (which runs here)")
    with pytest.raises(UserError) as error:
        capabilities.check_fp8("blockwise", replace(HOPPER, transformer_engine=None))
    assert "pip install 'gipo-megatron[gpu]'" in error.value.fix


def test_another_recipe_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="mxfp8"):
        capabilities.fp8_obstacle("mxfp8", HOPPER)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.11.0+cu13", (2, 11, 0)), ("13.0", (13, 0)), ("2.9.0.dev0", (2, 9, 0)), ("unknown", ())],
)
def test_numbers(text: str, expected: tuple) -> None:
    assert capabilities.numbers(text) == expected


@pytest.mark.parametrize("folder", ["multi_tensor_apply", "request"])
def test_whose_apex(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert "apex" not in sys.modules
    assert capabilities.find_apex() == Apex("unknown", nvidia=folder == "multi_tensor_apply")


@pytest.mark.parametrize(
    ("code", "reason", "stops_megatron"),
    [
        (
            broken_transformer_engine.ASSERTION,
            "AssertionError: Could not find `transformer-engine` PyPI package.",
            True,
        ),
        (
            broken_transformer_engine.IMPORT,
            "ImportError: libcudnn.so.9: cannot open shared object file",
            True,
        ),
        (
            broken_transformer_engine.MODULE,
            "ModuleNotFoundError: No module named 'pydantic', framework any",
            False,
        ),
        ("", "ModuleNotFoundError: No module named 'transformer_engine.pytorch'", False),
        ("import os; os._exit(77)", "exit code 77", True),  # as a build for another torch may end
    ],
)
def test_why_transformer_engine_does_not_import(
    code: str, reason: str, stops_megatron: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = broken_transformer_engine.install(tmp_path, code)
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.delenv("NVTE_FRAMEWORK", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert capabilities.transformer_engine_failure() == capabilities.Failure(reason, stops_megatron)


def test_no_transformer_engine_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert capabilities.transformer_engine_failure() is None


def test_whose_error_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("broken_a", "broken_ab"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"import {package}.part")
        (tmp_path / package / "part.py").write_text("assert False")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(AssertionError) as found:
        importlib.import_module("broken_ab")
    assert capabilities.raised_inside("broken_ab", found.value) and not capabilities.raised_inside(
        "broken_a", found.value
    )


def test_this_machine() -> None:
    here = capabilities.probe()
    assert here.torch == torch.__version__ and here.megatron is not None
    assert len(here.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
