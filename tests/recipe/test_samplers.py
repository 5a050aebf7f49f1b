"""Checks of a sampler on a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation import test_recipe as evaluations
from tests.recipe.helpers import problems, small

VLLM = "algorithm.rollout.name=vllm"
ROLLOUT, SERVE = "algorithm.rollout", "algorithm.rollout.serve"
GPUS = ("hardware.gpus=16", "hardware.gpu_memory_gib=80")
# four heads that two key-value heads serve, 96 wide
GROUPED = ("model.architecture.num_kv_heads=2", "model.architecture.ffn_hidden_size=96")


def server(folder: Path, *words: str, world: int = 1) -> list[tuple[str, str, str]]:
    """Return (key, problem, fix) of each problem."""
    return [(p.key, p.what, p.fix) for p in problems(folder, VLLM, *words, world=world)]


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        ((*GPUS, f"{SERVE}.tensor_parallel=16"), "16, and a machine has 8", "8"),
        (
            (*GPUS, f"{SERVE}.devices='4,5'", f"{SERVE}.tensor_parallel=4"),
            "4, and serve.devices lists 2",
            "2",
        ),
    ],
)
def test_more_gpus_than_there_are(
    tmp_path: Path, words: tuple[str, ...], what: str, fix: str
) -> None:
    wide = ("model.architecture.num_heads=16", "model.architecture.num_kv_heads=16")
    key = f"{SERVE}.tensor_parallel"
    assert server(tmp_path, *wide, *words, world=16) == [(key, what, f"{key}={fix}")]


@pytest.mark.parametrize("tensor", [3, 8])
def test_tensor_ranks_that_do_not_divide_the_model(tmp_path: Path, tensor: int) -> None:
    found = server(tmp_path, *GROUPED, f"{SERVE}.tensor_parallel={tensor}")
    what = f"{tensor} does not divide num_heads 4, num_kv_heads 2, ffn_hidden_size 96"
    assert found == [(f"{SERVE}.tensor_parallel", what, "divisors of 4: 1, 2, 4")]


def test_key_value_heads_may_be_fewer_than_tensor_ranks(tmp_path: Path) -> None:
    """vLLM copies each to several of them."""
    for tensor in (1, 2, 4):
        assert small(tmp_path, VLLM, *GROUPED, f"{SERVE}.tensor_parallel={tensor}").warnings == ()


def test_nccl_has_no_two_ranks_on_a_gpu(tmp_path: Path) -> None:
    broadcast = f"{ROLLOUT}.transfer=broadcast"
    for devices in ("''", "'1,0'"):
        words = (broadcast, *GPUS, f"{SERVE}.devices={devices}", f"{SERVE}.tensor_parallel=2")
        ((key, what, fix),) = server(tmp_path, *words, world=16)
        assert key == f"{ROLLOUT}.transfer" and "no two ranks on one GPU" in what
        assert fix.startswith(f"{ROLLOUT}.transfer=file")
    others = ((broadcast,), (broadcast, *GPUS, f"{SERVE}.devices='8'"))
    for words in others:
        assert small(tmp_path, VLLM, *words, world=16).warnings == ()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("precision.dtype=fp32",), []),
        (("precision.dtype=bf16",), [f"{ROLLOUT}.correction"]),
        (("precision.dtype=bf16", f"{ROLLOUT}.correction=truncated"), []),
        (("precision.deterministic=true",), ["precision.deterministic"]),
        ((f"{ROLLOUT}.url=http://node7:8000",), [f"{ROLLOUT}.transfer"]),
        ((f"{ROLLOUT}.url=http://node7:8000", f"{ROLLOUT}.transfer=broadcast"), []),
        ((f"{ROLLOUT}.url=http://127.0.0.1:8000",), []),
        ((f"{ROLLOUT}.url=http://localhost:8000/",), []),
        ((f"{ROLLOUT}.url=http://0.0.0.0:8000",), []),
        ((f"{ROLLOUT}.url=http://10.0.0.7:8000",), [f"{ROLLOUT}.transfer"]),
        ((f"{ROLLOUT}.url='http://[::1]:8000'",), []),
        ((f"{ROLLOUT}.top_p=0.9",), [f"{ROLLOUT}.top_p"]),
    ],
)
def test_warnings(tmp_path: Path, words: tuple[str, ...], expected: list[str]) -> None:
    warnings = small(tmp_path, VLLM, *words).warnings
    assert [warning.split(":")[0] for warning in warnings] == expected


def test_the_own_decoder_has_none(tmp_path: Path) -> None:
    words = ("precision.dtype=bf16", "precision.deterministic=true")
    assert small(tmp_path, *words).warnings == ()


def test_evaluations_have_the_same_checks(tmp_path: Path) -> None:
    (problem,) = evaluations.problems(
        tmp_path, "rollout.name=vllm", "rollout.serve.tensor_parallel=3"
    )
    assert problem.key == "rollout.serve.tensor_parallel"
    warnings = evaluations.small(
        tmp_path, "rollout={name: vllm, url: http://node7:8000}", "precision.dtype=bf16"
    ).warnings
    (warning,) = [w for w in warnings if "is not on this machine" not in w]
    assert warning.startswith("rollout.transfer: file needs the server on rank 0's machine")
