from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_config import TransformerConfig

from gipo_megatron.capabilities import Capabilities, GpuInfo
from gipo_megatron.errors import UserError
from gipo_megatron.megatron import precision
from gipo_megatron.megatron.generate import generate
from gipo_megatron.megatron.heads import LanguageHead, ScalarHead
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks, transformer_config
from gipo_megatron.specs import Parallel, Precision, Sampling
from gipo_megatron.types import Prompts
from tests import broken_transformer_engine
from tests.parity.tiny import ARCHITECTURE, sequences


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            Precision("fp32"),
            {"params_dtype": torch.float32, "pipeline_dtype": torch.float32, "bf16": False},
        ),
        (
            Precision("bf16"),
            {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True},
        ),
    ],
)
def test_dtype_fields(recipe: Precision, expected: dict) -> None:
    assert precision.config_fields(recipe) == expected


@pytest.mark.parametrize("cuda", [False, True])
def test_determinism_is_a_switch_of_megatrons_on_cuda_alone(
    cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the key changes no number, so it changes no field."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    plain, fields = (
        precision.config_fields(Precision("bf16", deterministic=on)) for on in (False, True)
    )
    assert fields == (plain | {"deterministic_mode": True} if cuda else plain)
    assert (
        TransformerConfig(
            num_layers=1, hidden_size=32, num_attention_heads=2, **fields
        ).deterministic_mode
        == cuda
    )


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise"])
def test_fp8_fields_are_accepted_by_the_transformer_config(name: str) -> None:
    fields = precision.config_fields(Precision("bf16", name))
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, **fields)
    assert (config.fp8, config.fp8_recipe, config.disable_parameter_transpose_cache) == (
        "hybrid",
        name,
        True,
    )
    assert ("fp8_amax_history_len" in fields) == (name == "delayed")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Precision("int8"), "unknown precision 'int8'"),
        (Precision("bf16", "mxfp8"), "unknown FP8 recipe 'mxfp8'"),
        (Precision("fp32", "delayed"), "FP8 needs bf16"),
    ],
)
def test_mistakes_are_told(recipe: Precision, words: str) -> None:
    with pytest.raises(UserError, match=words):
        precision.check(recipe)


ADA = GpuInfo("NVIDIA L4", (8, 9), 22.5)
HERE = Capabilities("3.12.3", "2.11.0", cuda="12.8", gpus=(ADA,), transformer_engine="2.11.0")


def test_what_the_machine_cannot_do_is_a_user_error() -> None:
    """All refusals are in tests/test_capabilities.py."""
    precision.check(Precision("bf16", "tensorwise"), HERE)
    with pytest.raises(UserError, match="compute capability") as error:
        precision.check(Precision("bf16", "blockwise"), HERE)
    assert (
        error.value.where == "precision.fp8" and "tensorwise (which runs here)" in error.value.fix
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_fp8_without_a_gpu(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        transformer_config(ARCHITECTURE, Parallel(), Precision("bf16", "blockwise"))


# ------------------------------------------------------------------------------- Transformer Engine


@pytest.mark.parametrize(
    ("cuda", "there", "usable"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_transformer_engine_is_usable(
    cuda: bool, there: bool, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    monkeypatch.setattr(precision, "HAVE_TE", there)
    assert precision.transformer_engine_usable() is usable


BROKEN = """
import torch
from gipo_megatron.megatron import precision
from gipo_megatron.specs import Precision
precision.check(Precision("bf16"))  # without CUDA its layers are not Transformer Engine's
torch.cuda.is_available = lambda: True
precision.check(Precision("fp32"))
try:
    precision.check(Precision("bf16"))
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_package_that_transformer_engine_lacks_is_told_where_it_would_be_used(
    tmp_path: Path,
) -> None:
    """Megatron-Core goes on with mocks in its place. The error shows, too, that it is imported for
    PyTorch alone."""
    environment = broken_transformer_engine.install(tmp_path, broken_transformer_engine.MODULE)
    done = subprocess.run(
        [sys.executable, "-c", BROKEN],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    what, where, fix = done.stdout.splitlines()
    reason = "ModuleNotFoundError: No module named 'pydantic', framework pytorch"
    assert what == f"UserError Transformer Engine is installed, but does not import: {reason}"
    assert (
        "Python environment" in where
        and "pip install 'gipo-megatron[gpu]'" in fix
        and "pip uninstall transformer-engine " in fix
    )


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("ASSERTION", "AssertionError: Could not find `transformer-engine` PyPI package."),
        ("IMPORT", "ImportError: libcudnn.so.9: cannot open shared object file"),
    ],
)
def test_another_error_in_transformer_engine_ends_no_run_with_a_traceback(
    tmp_path: Path, kind: str, reason: str
) -> None:
    """It comes through Megatron-Core, which expects ModuleNotFoundError alone
    (tensor_parallel/random.py)."""
    environment = broken_transformer_engine.install(
        tmp_path, getattr(broken_transformer_engine, kind)
    )
    launcher = broken_transformer_engine.ROOT / "launch" / "train.py"
    command = [sys.executable, str(launcher), "recipe=tiny/sft", f"run.dir={tmp_path}/run"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"does not import: {reason}\n" in done.stderr
    assert "pip install 'gipo-megatron[gpu]'" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "tensor", "words"),
    [
        ({}, 1, ""),
        ({"hidden_size": 40}, 1, "hidden_size is 40"),
        ({"ffn_hidden_size": 48}, 2, "ffn_hidden_size 48 / tensor 2 is 24"),
        ({"head_dim": 8}, 4, "num_heads 4 × head_dim 8 / tensor 4 is 8"),
        ({"num_heads": 6, "num_kv_heads": 3, "head_dim": 8}, 1, ""),
    ],
)
def test_widths(change: dict, tensor: int, words: str) -> None:
    """Multiples of 16 on each tensor rank, as Transformer Engine's assert_dim_for_fp8_exec asks of
    a tensor's last dimension."""
    shape = replace(ARCHITECTURE, **{"ffn_hidden_size": 128, "head_dim": 16, **change})
    precision.check_widths(Precision("bf16"), shape, Parallel(tensor=tensor))
    if words:
        with pytest.raises(UserError, match=words):
            precision.check_widths(Precision("bf16", "delayed"), shape, Parallel(tensor=tensor))
    else:
        precision.check_widths(Precision("bf16", "delayed"), shape, Parallel(tensor=tensor))


def test_rows_are_padded_to_what_megatron_says() -> None:
    assert {get_fp8_align_size(recipe) for recipe in precision.FP8_RECIPES.values()} == {
        precision.FP8_ROWS
    }


@pytest.mark.parametrize(
    ("recipe", "parallel", "multiple"),
    [
        (Precision("bf16"), Parallel(tensor=4), 1),
        (Precision("bf16"), Parallel(tensor=4, sequence=True), 4),
        (Precision("bf16", "delayed"), Parallel(tensor=4), 16),
        (Precision("bf16", "delayed"), Parallel(tensor=4, sequence=True), 64),
    ],
)
def test_length_multiple(recipe: Precision, parallel: Parallel, multiple: int) -> None:
    assert precision.length_multiple(recipe, parallel) == multiple


# ------------------------------------------------------------------------------------- where FP8 is


def spied(chunk: GPTModel, recipe: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """{module: whether it ran inside FP8's autocast}, filled by forward passes: Transformer
    Engine's context, replaced by a flag."""
    inside, seen = [False], {}

    @contextmanager
    def context(
        config: TransformerConfig, layer_no: int = -1, is_init: bool = False
    ) -> Iterator[None]:
        assert config.fp8 == "hybrid" and not is_init
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(transformer_block, "get_fp8_context", context)
    monkeypatch.setattr(chunk.config, "fp8", "hybrid")
    monkeypatch.setattr(chunk.config, "fp8_recipe", precision.FP8_RECIPES[recipe])
    for name in (
        "embedding",
        "decoder.layers.0.self_attention",
        "decoder.layers.3.mlp",
        "output_layer",
    ):
        chunk.get_submodule(name).register_forward_hook(
            lambda module, inputs, out, name=name: seen.update({name: inside[0]})
        )
    return seen


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_embedding_output_and_heads_are_outside_fp8(
    mesh: Mesh, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sequences([(3, 13)], seed=1)
    for head in (None, "value"):
        (chunk,) = build_chunks(ARCHITECTURE, mesh, Precision("bf16"), head=head)
        seen = spied(chunk, recipe, monkeypatch)
        out = chunk(rows.tokens, None, None)
        layers = {"decoder.layers.0.self_attention": True, "decoder.layers.3.mlp": True}
        assert seen == {"embedding": False, **layers, "output_layer": False}
        assert type(chunk.embedding.word_embeddings) is VocabParallelEmbedding
        # none of Transformer Engine's
        assert type(chunk.output_layer) is (LanguageHead if head is None else ScalarHead)
        assert out.dtype == (torch.bfloat16 if head is None else torch.float32)


def test_generation_is_outside_fp8(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder multiplies with the weights itself: no module of the layers runs, so no length
    has to be padded and no amax is seen."""
    (chunk,) = build_chunks(ARCHITECTURE, mesh, Precision("bf16"))
    seen = spied(chunk, "delayed", monkeypatch)
    ids = torch.arange(1)
    prompts = Prompts(torch.tensor([[5, 6, 7]]), torch.tensor([3]), ids, ids, ("",), ({},))
    generate([chunk], ARCHITECTURE, mesh, prompts, Sampling(4, temperature=0.0), [-1], 0, str)
    assert seen == {}
