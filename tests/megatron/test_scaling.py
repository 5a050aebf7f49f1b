"""FP8's scaling state on fakes of Transformer Engine's modules: what moves it, what keeps it, what
is stored, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.checkpoint import writing
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.offload import Snapshot
from gipo_megatron.megatron.roles import MegatronActor
from gipo_megatron.megatron.scaling import Scaling
from gipo_megatron.specs import Precision
from gipo_megatron.weights.checkpoints import CheckpointMeta
from tests.parity.roles import new_actor
from tests.parity.te import FakeLinear, as_bytes, fake_fp8, numbered, story
from tests.parity.tiny import language_loss, pretraining

pytestmark = pytest.mark.global_rng
FRESH = (1.0, [0, 0, 0, 0])
# one training pass with amax 2: 448 / 2, and the row is one pass old
TRAINED = (224.0, [0, 0, 0, 2])
SCALING = {f"0.decoder.layers.{i}.fake": numbered(i) for i in range(4)}


def actor_and_fakes(mesh: Mesh, **changes: Any) -> tuple[MegatronActor, list[FakeLinear]]:
    actor = new_actor(mesh, **{"micro_batch": 4, **changes})
    return actor, fake_fp8(actor.engine)


def train(actor: MegatronActor) -> None:
    actor.update((pretraining(), language_loss))


def same(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name][field], b[name][field]) for name in a for field in b[name]
    )


# ------------------------------------------------------------------------------------------- passes


def test_inference_leaves_no_trace(mesh: Mesh) -> None:
    actor, fakes = actor_and_fakes(mesh)
    actor.logprobs(pretraining())
    # never trained: bf16
    assert (
        all(story(fake) == FRESH and not fake.fp8 for fake in fakes)
        and actor.engine.scaling.read() == {}
    )
    assert actor.engine.chunks[0].config.fp8 == "hybrid"
    train(actor)
    assert [story(fake) for fake in fakes] == [TRAINED] * 4
    actor.logprobs(pretraining())
    assert all(fake.fp8 and story(fake) == TRAINED for fake in fakes)


def test_the_state_is_read_once_after_training(mesh: Mesh) -> None:
    """Passes put one kept copy back; they pickle nothing."""
    actor, fakes = actor_and_fakes(mesh)
    train(actor)
    kept = actor.engine.scaling.read()
    for _ in range(2):
        actor.logprobs(pretraining())
        assert actor.engine.scaling.read() is kept
    train(actor)
    assert actor.engine.scaling.read() is not kept
    assert all(fake.pickled == 0 for fake in fakes)


@pytest.mark.parametrize("trained", [False, True])
def test_other_models_training_does_not_age_it(mesh: Mesh, trained: bool) -> None:
    changes = {} if trained else {"optimisation": None}
    actor, fakes = actor_and_fakes(mesh, **changes)
    actor.engine.scaling.write(SCALING)
    actor.logprobs(pretraining())
    for _ in range(3):
        for fake in fakes:
            fake.age()
    assert story(fakes[0]) == (64.0, [0, 0, 0, 0])
    actor.logprobs(pretraining())
    assert [story(fake) for fake in fakes] == [(100.0 + i, [0, i, 0, 7]) for i in range(4)]
    if trained:  # its own training goes on from its own state, and keeps what it leaves
        fakes[0].age()
        train(actor)
        assert story(fakes[0]) == (64.0, [0, 0, 7, 2])
        for fake in fakes:
            fake.age()
        actor.logprobs(pretraining())
        assert story(fakes[0]) == (64.0, [0, 0, 7, 2])


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("mine", [False, True])
def test_a_reference_brings_its_own(mesh: Mesh, mine: bool, theirs: bool) -> None:
    """Live model and reference, each with and without a history."""
    actor, fakes = actor_and_fakes(mesh)
    engine, passes = actor.engine, []
    weights = engine.snapshot().weights
    reference = Snapshot(weights, SCALING if theirs else {})
    if mine:
        train(actor)
    before = (story(fakes[0]), engine.scaling.read().keys())
    with engine.swapped(reference):
        engine.chunks[0].decoder.layers[0].register_forward_hook(
            lambda *_: passes.append((fakes[0].fp8, story(fakes[0])[0]))
        )
        actor.logprobs(pretraining())
    assert passes == [(theirs, 100.0 if theirs else 1.0)]
    assert (story(fakes[0]), engine.scaling.read().keys()) == before
    with pytest.raises(RuntimeError, match="inside"), engine.swapped(reference):
        raise RuntimeError("inside")
    assert (story(fakes[0]), engine.scaling.read().keys()) == before


def test_it_is_written_where_the_quantizers_look(mesh: Mesh) -> None:
    """Into the tensors that are there; `story` compares a view of them."""
    actor, fakes = actor_and_fakes(mesh)
    train(actor)
    addresses = [t.data_ptr() for t in fakes[0].fp8_meta["scaling_fwd"].__dict__.values()]
    actor.engine.scaling.write(SCALING)
    assert story(fakes[0]) == (100.0, [0, 0, 0, 7])
    assert [t.data_ptr() for t in fakes[0].fp8_meta["scaling_fwd"].__dict__.values()] == addresses


def test_attention_without_weights_is_left_out(mesh: Mesh) -> None:
    """Transformer Engine's has the same attributes, and mcore stores no extra state of it; its own
    products are not in FP8."""
    actor, fakes = actor_and_fakes(mesh)
    attention = actor.engine.chunks[0].decoder.layers[0].self_attention.core_attention
    attention.fp8_meta = {"fp8_checkpoint": True}
    actor.engine.scaling = Scaling(actor.engine.chunks, Precision("bf16", "delayed"))
    train(actor)
    assert actor.engine.scaling.read().keys() == SCALING.keys() and len(fakes) == 4


# -------------------------------------------------------------------------------------- checkpoints


def saved(mesh: Mesh, folder: Path, fp8: str = "delayed") -> Path:
    """An actor whose layers have SCALING, in a checkpoint of a run with `fp8`."""
    actor, _ = actor_and_fakes(mesh)
    actor.engine.scaling.write(SCALING)
    if fp8 != "delayed":
        actor.engine.scaling = Scaling(actor.engine.chunks, Precision("bf16", fp8))
    return checkpoint.save(folder, {"actor": actor.engine}, mesh, CheckpointMeta(1))


@pytest.mark.parametrize("how", ["restore", "load_weights"])
def test_checkpoints_carry_it_bit_for_bit(mesh: Mesh, tmp_path: Path, how: str) -> None:
    path = saved(mesh, tmp_path)
    actor, fakes = actor_and_fakes(mesh)
    if how == "restore":
        checkpoint.restore(path, {"actor": actor.engine}, mesh)
    else:
        checkpoint.load_weights(path, "actor", actor.engine)
    assert same(actor.engine.scaling.read(), SCALING)
    assert [fake.fp8_meta["num_gemms"] for fake in fakes] == [1, 1, 1, 1]


def test_checkpoints_have_tensors_only(mesh: Mesh, tmp_path: Path) -> None:
    stored = (
        torch_checkpoint.FileSystemReader(saved(mesh, tmp_path) / "actor")
        .read_metadata()
        .state_dict_metadata
    )
    # mcore 0.19 stores its own settings as bytes in common_state
    kinds = {type(x) for key, x in stored.items() if not key.startswith("common_state/")}
    assert kinds == {TensorStorageMetadata}
    # layers, rows, gradients
    assert stored["decoder.layers.fake.fp8.amax_history_bwd"].size == (4, 4, 2)
    assert sum(".fp8." in key for key in stored) == 4


def test_between_delayed_scaling_and_none(mesh: Mesh, tmp_path: Path) -> None:
    """A run without takes none from a checkpoint with; a run with starts afresh from one without,
    also when it had some."""
    path = saved(mesh, tmp_path / "with")
    plain, fakes = actor_and_fakes(mesh)
    plain.engine.scaling = Scaling(plain.engine.chunks, Precision("bf16", "tensorwise"))
    checkpoint.restore(path, {"actor": plain.engine}, mesh)
    assert all(story(fake) == FRESH and not fake.fp8_meta["fp8_checkpoint"] for fake in fakes)
    without = saved(mesh, tmp_path / "without", fp8="tensorwise")
    actor, fakes = actor_and_fakes(mesh)
    train(actor)
    checkpoint.restore(without, {"actor": actor.engine}, mesh)
    assert [story(fake) for fake in fakes] == [FRESH] * 4 and actor.engine.scaling.read() == {}


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("how", ["restore", "load_weights"])
def test_foreign_pickles_are_never_read(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What version 1 stored: refused where delayed scaling would need it, ignored elsewhere."""

    def load(engine: Any) -> None:
        if how == "restore":
            checkpoint.restore(path, {"actor": engine}, mesh)
        else:
            checkpoint.load_weights(path, "actor", engine)

    made, bomb = tmp_path / "made", Bomb(tmp_path / "made")
    with monkeypatch.context() as patch:
        patch.setattr(FakeLinear, "get_extra_state", lambda self: as_bytes(bomb))
        patch.setattr(writing, "without_extra_states", dict)
        path = saved(mesh, tmp_path, fp8="tensorwise")
    stored = torch_checkpoint.FileSystemReader(path / "actor").read_metadata().state_dict_metadata
    assert sum("fake._extra_state" in key for key in stored) == 4
    actor, _ = actor_and_fakes(mesh)
    with pytest.raises(UserError, match="pickles of Transformer Engine") as error:
        load(actor.engine)
    assert "precision.fp8 to tensorwise" in error.value.fix and not made.exists()
    actor.engine.scaling = Scaling(actor.engine.chunks, Precision("bf16", "tensorwise"))
    load(actor.engine)
    assert not made.exists()


def test_mcores_state_dicts_name_each_modules_place(mesh: Mesh) -> None:
    """Scaling.to_save stands on it."""
    actor, _ = actor_and_fakes(mesh)
    found = actor.engine.chunks[0].sharded_state_dict()["decoder.layers.2.fake._extra_state"]
    assert isinstance(found, ShardedObject)
    assert (found.key, found.global_shape, found.global_offset) == (
        "decoder.layers.fake._extra_state",
        (4,),
        (2,),
    )
