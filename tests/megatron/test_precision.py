from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gipo_megatron.capabilities import Capabilities, Gpu
from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint, precision
from gipo_megatron.megatron.checkpoint import _InlineSave
from gipo_megatron.megatron.generate import generate
from gipo_megatron.megatron.heads import ScalarHead
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.model import build_chunks, transformer_config
from gipo_megatron.megatron.pipeline import quiet
from gipo_megatron.megatron.residency import Snapshot
from gipo_megatron.megatron.schedule import Engine
from gipo_megatron.specs import Parallel, Precision, Sampling
from gipo_megatron.types import Prompts
from tests import broken_transformer_engine
from tests.parity.roles import new_actor
from tests.parity.tiny import ARCHITECTURE, language_loss, pretraining, sequences


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Precision("fp32"), {"params_dtype": torch.float32, "pipeline_dtype": torch.float32, "bf16": False}),
        (Precision("bf16"), {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}),
    ],
)
def test_dtype_fields(recipe: Precision, expected: dict) -> None:
    assert precision.config_fields(recipe) == expected


@pytest.mark.parametrize("cuda", [False, True])
def test_determinism_is_a_switch_of_megatrons_on_cuda_alone(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the key changes no number, so it changes no field."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    plain, fields = (precision.config_fields(Precision("bf16", deterministic=on)) for on in (False, True))
    assert fields == (plain | {"deterministic_mode": True} if cuda else plain)
    assert TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, **fields).deterministic_mode == cuda


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise"])
def test_fp8_fields_are_accepted_by_the_transformer_config(name: str) -> None:
    fields = precision.config_fields(Precision("bf16", name))
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, **fields)
    assert (config.fp8, config.fp8_recipe, config.disable_parameter_transpose_cache) == ("hybrid", name, True)
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


ADA = Gpu("NVIDIA L4", (8, 9), 22.5)
HERE = Capabilities("3.12.3", "2.11.0", cuda="12.8", gpus=(ADA,), transformer_engine="2.11.0")


def test_what_the_machine_cannot_do_is_a_user_error() -> None:
    """All refusals are in tests/test_capabilities.py."""
    precision.check(Precision("bf16", "tensorwise"), HERE)
    with pytest.raises(UserError, match="compute capability") as error:
        precision.check(Precision("bf16", "blockwise"), HERE)
    assert error.value.where == "precision.fp8" and "tensorwise (which runs here)" in error.value.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_fp8_without_a_gpu(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        transformer_config(ARCHITECTURE, Parallel(), Precision("bf16", "blockwise"))


# ------------------------------------------------------------------------------------------------- Transformer Engine


@pytest.mark.parametrize(("cuda", "there", "usable"), [(True, True, True), (False, True, False), (True, False, False)])
def test_transformer_engine_is_usable(cuda: bool, there: bool, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_package_that_transformer_engine_lacks_is_told_where_it_would_be_used(tmp_path: Path) -> None:
    """Megatron-Core goes on with mocks in its place. The error shows, too, that it is imported for PyTorch alone."""
    environment = broken_transformer_engine.install(tmp_path, broken_transformer_engine.MODULE)
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    what, where, fix = done.stdout.splitlines()
    reason = "ModuleNotFoundError: No module named 'pydantic', framework pytorch"
    assert what == f"UserError Transformer Engine is installed, but does not import: {reason}"
    assert "Python environment" in where and "pip install 'gipo-megatron[gpu]'" in fix and "pip uninstall transformer-engine " in fix


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("ASSERTION", "AssertionError: Could not find `transformer-engine` PyPI package."),
        ("IMPORT", "ImportError: libcudnn.so.9: cannot open shared object file"),
    ],
)
def test_another_error_in_transformer_engine_ends_no_run_with_a_traceback(tmp_path: Path, kind: str, reason: str) -> None:
    """It comes through Megatron-Core, which expects ModuleNotFoundError alone (tensor_parallel/random.py)."""
    environment = broken_transformer_engine.install(tmp_path, getattr(broken_transformer_engine, kind))
    launcher = broken_transformer_engine.ROOT / "launch" / "train.py"
    command = [sys.executable, str(launcher), "recipe=tiny/sft", f"run.dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200, check=False)
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
    """Multiples of 16 on each tensor rank, as Transformer Engine's assert_dim_for_fp8_exec asks of a tensor's last dimension."""
    shape = replace(ARCHITECTURE, **{"ffn_hidden_size": 128, "head_dim": 16, **change})
    precision.check_widths(Precision("bf16"), shape, Parallel(tensor=tensor))
    if words:
        with pytest.raises(UserError, match=words):
            precision.check_widths(Precision("bf16", "delayed"), shape, Parallel(tensor=tensor))
    else:
        precision.check_widths(Precision("bf16", "delayed"), shape, Parallel(tensor=tensor))


def test_rows_are_padded_to_what_megatron_says() -> None:
    assert {get_fp8_align_size(recipe) for recipe in precision.FP8_RECIPES.values()} == {precision.FP8_ROWS}


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


# ------------------------------------------------------------------------------------------------- where FP8 is


def spied(chunk: GPTModel, recipe: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """{module: whether it ran inside FP8's autocast}, filled by forward passes: Transformer Engine's context, replaced by a flag."""
    inside, seen = [False], {}

    @contextmanager
    def context(config: TransformerConfig, layer_no: int = -1, is_init: bool = False) -> Iterator[None]:
        assert config.fp8 == "hybrid" and not is_init
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(transformer_block, "get_fp8_context", context)
    monkeypatch.setattr(chunk.config, "fp8", "hybrid")
    monkeypatch.setattr(chunk.config, "fp8_recipe", precision.FP8_RECIPES[recipe])
    for name in ("embedding", "decoder.layers.0.self_attention", "decoder.layers.3.mlp", "output_layer"):
        chunk.get_submodule(name).register_forward_hook(lambda module, inputs, out, name=name: seen.update({name: inside[0]}))
    return seen


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_embedding_output_and_heads_are_outside_fp8(mesh: Mesh, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sequences([(3, 13)], seed=1)
    for head in (None, "value"):
        (chunk,) = build_chunks(ARCHITECTURE, mesh, Precision("bf16"), head=head)
        seen = spied(chunk, recipe, monkeypatch)
        out = chunk(rows.tokens, None, None)
        layers = {"decoder.layers.0.self_attention": True, "decoder.layers.3.mlp": True}
        assert seen == {"embedding": False, **layers, "output_layer": False}
        assert type(chunk.embedding.word_embeddings) is VocabParallelEmbedding
        assert type(chunk.output_layer) is (ColumnParallelLinear if head is None else ScalarHead)  # none of Transformer Engine's
        assert out.dtype == (torch.bfloat16 if head is None else torch.float32)


def test_generation_is_outside_fp8(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder multiplies with the weights itself: no module of the layers runs, so no length has to be padded and no amax is seen."""
    (chunk,) = build_chunks(ARCHITECTURE, mesh, Precision("bf16"))
    seen = spied(chunk, "delayed", monkeypatch)
    ids = torch.arange(1)
    prompts = Prompts(torch.tensor([[5, 6, 7]]), torch.tensor([3]), ids, ids, ("",), ({},))
    generate([chunk], ARCHITECTURE, mesh, prompts, Sampling(4, temperature=0.0), -1, 0, str)
    assert seen == {}


# ------------------------------------------------------------------------------------------------- scaling state


class FakeLinear(nn.Module):
    """The scaling state of Transformer Engine's modules (2.11, module/base.py): what a pass writes, what extra state says and ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.history = torch.ones(()), torch.zeros(3)
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False

    def run(self, enabled: bool, amax: float) -> None:
        self.fp8 = self.fp8_meta["fp8_checkpoint"] = enabled
        if enabled:
            self.history[0] = max(float(self.history[0]), amax)
            if torch.is_grad_enabled():
                self.age()

    def age(self) -> None:
        """What leaving the autocast of a training pass does to every module of the process."""
        self.scale = 448 / self.history.max() if self.history.max() > 0 else self.scale
        self.history = self.history.roll(1)
        self.history[0] = 0

    def get_extra_state(self) -> Tensor:
        if not (self.fp8 or self.fp8_meta["fp8_checkpoint"]):
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps((self.scale.item(), self.history.tolist()))), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if state.numel():
            scale, history = pickle.loads(state.numpy().tobytes())
            self.scale, self.history = torch.tensor(scale), torch.tensor(history)
            self.fp8_meta["fp8_checkpoint"] = True

    def reset_fp8_meta_tensors(self) -> None:
        self.scale, self.history = torch.ones(()), torch.zeros(3)


def fake_fp8(engine: Engine, amax: Callable[[], float] = lambda: 2.0) -> FakeLinear:
    """A module with delayed scaling in the engine's first layer, run whenever the layer is."""
    fake, chunk = FakeLinear(), engine.chunks[0]
    chunk.decoder.layers[0].fake = fake
    chunk.decoder.layers[0].register_forward_hook(lambda *_: fake.run(chunk.config.fp8 is not None, amax()))
    assert chunk.decoder.config is chunk.config
    chunk.config.fp8 = "hybrid"
    engine.scaling = precision.Scaling(engine.chunks, Precision("bf16", "delayed"), trained=engine.optimisation is not None)
    return fake


def story(fake: FakeLinear) -> tuple[float, list[float]]:
    return float(fake.scale), fake.history.tolist()


@pytest.mark.global_rng
def test_inference_leaves_no_trace_in_the_scaling_state(mesh: Mesh) -> None:
    actor = new_actor(mesh, micro_batch=4)
    fake = fake_fp8(actor.engine)
    actor.logprobs(pretraining())
    assert story(fake) == (1.0, [0, 0, 0]) and not fake.fp8 and actor.engine.scaling.read() == {}  # it never trained: bf16
    assert actor.engine.chunks[0].config.fp8 == "hybrid"
    actor.update((pretraining(), language_loss))
    trained = (224.0, [0, 2, 0])
    assert story(fake) == trained
    actor.logprobs(pretraining())
    assert fake.fp8 and story(fake) == trained


@pytest.mark.global_rng
def test_a_frozen_model_does_not_age_with_the_others(mesh: Mesh) -> None:
    actor = new_actor(mesh, optimisation=None)
    fake = fake_fp8(actor.engine)
    fake.set_extra_state(torch.frombuffer(bytearray(pickle.dumps((3.0, [0.0, 7.0, 1.0]))), dtype=torch.uint8))
    actor.logprobs(pretraining())
    for _ in range(3):
        fake.age()
    assert story(fake) == (64.0, [0, 0, 0])
    actor.logprobs(pretraining())
    assert story(fake) == (3.0, [0, 7, 1])


@pytest.mark.global_rng
@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("mine", [False, True])
def test_a_reference_brings_its_own_scaling_state(mesh: Mesh, mine: bool, theirs: bool) -> None:
    """Live model and reference, each with and without a history."""
    actor = new_actor(mesh, micro_batch=4)
    engine, passes = actor.engine, []
    fake = fake_fp8(engine)
    scales = torch.frombuffer(bytearray(pickle.dumps((5.0, [0.0, 9.0, 0.0]))), dtype=torch.uint8)
    weights = engine.snapshot().weights
    reference = Snapshot(weights, {"0.decoder.layers.0.fake": scales} if theirs else {})
    if mine:
        actor.update((pretraining(), language_loss))
    before = (story(fake), engine.scaling.read().keys())
    with engine.swapped(reference):
        engine.chunks[0].decoder.layers[0].register_forward_hook(lambda *_: passes.append((fake.fp8, float(fake.scale))))
        actor.logprobs(pretraining())
    assert passes == [(theirs, 5.0 if theirs else 1.0)]
    assert (story(fake), engine.scaling.read().keys()) == before
    with pytest.raises(RuntimeError, match="inside"), engine.swapped(reference):
        raise RuntimeError("inside")
    assert (story(fake), engine.scaling.read().keys()) == before


@pytest.mark.global_rng
def test_scaling_state_in_checkpoints(mesh: Mesh, tmp_path: Path) -> None:
    """Kept where delayed scaling needs it; a checkpoint without any can be loaded, as can one with, where it is not needed."""
    delayed, fake = Precision("bf16", "delayed"), "decoder.layers.0.fake._extra_state"
    engine = new_actor(mesh, micro_batch=4).engine
    module = fake_fp8(engine)
    module.run(True, 4.0)
    for layer in engine.chunks[0].decoder.layers[1:]:
        layer.fake = FakeLinear()  # mcore wants every layer's
    whole = engine.chunks[0].sharded_state_dict()
    assert precision.keep_scaling(whole, delayed) == whole and fake in whole
    plain = precision.keep_scaling(whole, Precision("bf16", "tensorwise"))
    weights = {key for key in whole if not key.endswith("_extra_state")}
    assert plain.keys() == weights and len(weights) == len(list(engine.chunks[0].named_parameters()))
    for name, saved in (("with", whole), ("without", plain)):
        (tmp_path / name).mkdir()
        dist_checkpointing.save(dict(saved), str(tmp_path / name), sharded_strategy=_InlineSave("torch_dist", 1))
        wanted = precision.stored_only(whole, tmp_path / name)
        assert wanted.keys() == saved.keys()
        with quiet():
            loaded = dist_checkpointing.load(dict(wanted), str(tmp_path / name))
        assert (fake in loaded) == (name == "with")
        if name == "with":
            module.reset_fp8_meta_tensors()
            module.set_extra_state(loaded[fake])
            assert story(module) == (112.0, [0, 4, 0])
    with quiet():
        assert dist_checkpointing.load(dict(plain), str(tmp_path / "with")).keys() == weights


@pytest.mark.global_rng
def test_scaling_state_through_whole_checkpoints(mesh: Mesh, tmp_path: Path) -> None:
    """Saved and restored, as a whole and as weights alone, between delayed scaling and none."""

    def make(fp8: str) -> tuple[Engine, FakeLinear]:
        engine = new_actor(mesh, micro_batch=4).engine
        fake = fake_fp8(engine)
        for layer in engine.chunks[0].decoder.layers[1:]:
            layer.fake = FakeLinear()
        engine.precision = Precision("fp32", fp8)
        return engine, fake

    (first, scaled), fresh, trained = make("delayed"), (1.0, [0, 0, 0]), (112.0, [0, 4, 0])
    scaled.run(True, 4.0)
    path = checkpoint.save(tmp_path, 1, {"actor": first}, mesh, {}, {})
    for precision_of_reader, expected in (("delayed", trained), ("tensorwise", fresh)):
        engine, fake = make(precision_of_reader)
        checkpoint.restore(path, {"actor": engine}, mesh)
        assert story(fake) == expected
    other, fake = make("delayed")
    checkpoint.load_weights(path, "actor", other)
    assert story(fake) == trained
    plain = checkpoint.save(tmp_path, 2, {"actor": engine}, mesh, {}, {})  # saved under tensorwise: none in it
    other, fake = make("delayed")
    checkpoint.restore(plain, {"actor": other}, mesh)
    checkpoint.load_weights(plain, "actor", other)
    assert story(fake) == fresh
