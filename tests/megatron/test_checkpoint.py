"""Checkpoints in one process: what is on disk, what is found, what is refused. Other layouts are in
tests/parity/test_training.py."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.build import load_into
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronActor, MegatronCritic
from gipo_megatron.specs import AdapterSpec
from gipo_megatron.weights.checkpoints import CheckpointMeta, latest, weights_kind
from tests.parity.roles import digest, engine, new_actor, new_critic, new_reward
from tests.parity.tiny import ARCHITECTURE, GROUP, critic_loss, pair_loss, pairs, weighted
from tests.test_errors import small_files

pytestmark = pytest.mark.global_rng


@pytest.fixture(scope="module")
def folder(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model after one step, and an untrained actor, in step_7."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    reward = new_reward(mesh)
    reward.update((pairs(), pair_loss))
    roles = {"actor": new_actor(mesh, optimisation=None).engine, "reward": reward.engine}
    path = checkpoint.save(
        directory,
        roles,
        mesh,
        CheckpointMeta(7, tokenizer="abc"),
        {"moments": torch.ones(2)},
        lambda p: (p / "recipe.yaml").write_text("x: 1"),
    )
    assert path == directory / "step_7"
    return path


def test_files(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {"meta.json", "state.pt", "actor", "reward", "recipe.yaml"}
    assert [p.name for p in folder.parent.iterdir()] == ["step_7"]
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["format"], meta["version"], meta["step"], meta["tokenizer"]) == (
        "gipo_megatron",
        2,
        7,
        "abc",
    )
    assert (
        meta["roles"]["actor"]["architecture"]["hidden_size"] == 32
        and meta["roles"]["reward"]["head"] == "score"
    )


def test_the_optimizer_is_gathered_on_the_host(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else mcore takes it through the GPU (`.cuda()`), a whole buffer at a time; and what torch
    caches there is given back first."""

    def through_the_gpu(*arguments: object) -> torch.Tensor:
        raise AssertionError("an optimizer shard goes to the GPU")

    emptied: list[int] = []
    actor = new_actor(mesh)
    monkeypatch.setattr(torch.Tensor, "cuda", through_the_gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(1))
    assert emptied == [1]


def test_a_checkpoint_of_version_1(mesh: Mesh, tmp_path: Path) -> None:
    """It has no FP8 scaling state, not even an empty one."""
    critic = new_critic(mesh)
    critic.update((weighted(), critic_loss))
    path = checkpoint.save(tmp_path, {"critic": critic.engine}, mesh, CheckpointMeta(1))
    common = torch.load(path / "critic" / "common.pt", weights_only=True)
    assert common.pop("scaling") == {}
    torch.save(common, path / "critic" / "common.pt")
    meta = json.loads((path / "meta.json").read_text())
    meta["files"]["critic/common.pt"] = (path / "critic" / "common.pt").stat().st_size
    (path / "meta.json").write_text(json.dumps({**meta, "version": 1, "digests": None}))
    again = new_critic(mesh, seed=3)
    version = again.engine.version
    checkpoint.restore(path, {"critic": again.engine}, mesh)
    assert digest(again) == digest(critic) and again.engine.version > version
    norms = [
        role.update((weighted(), critic_loss)).metrics["grad_norm"].result()
        for role in (again, critic)
    ]
    assert norms[0] == norms[1] and digest(again) == digest(critic), "the moments came back, too"


def test_latest_ignores_unfinished(folder: Path, tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    for name in ("step_2", "step_10", "step_11.tmp", "step_12", "other"):
        (tmp_path / name).mkdir()
    for name in ("step_2", "step_10", "step_11.tmp"):
        (tmp_path / name / "meta.json").write_text("{}")
    found = latest(tmp_path)
    assert found is not None and found.name == "step_10"  # 12 has no meta.json, 11 no final name


def test_keep_and_links(mesh: Mesh, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        path = checkpoint.save(directory, {}, mesh, CheckpointMeta(step), keep=2)
        if step == 1:
            checkpoint.link(tmp_path / "best", path)
    assert sorted(p.name for p in directory.iterdir()) == ["step_1", "step_3", "step_4"]
    checkpoint.link(tmp_path / "best", directory / "step_4")
    assert (tmp_path / "best").readlink() == Path("checkpoints/step_4")
    checkpoint.prune(directory, 2)  # what `best` was is no longer linked
    assert sorted(p.name for p in directory.iterdir()) == ["step_3", "step_4"]
    checkpoint.prune(tmp_path / "none", 2)
    # the same step once more
    checkpoint.save(directory, {}, mesh, CheckpointMeta(4), {"again": 1}, keep=2)
    assert checkpoint.restore(tmp_path / "best", {}, mesh) == {"again": 1}


# mcore's common.pt, which torch writes in C++; then the tensors
@pytest.mark.parametrize("size", [1000, 10_000])
def test_a_full_disk_is_named_and_leaves_nothing(size: int, mesh: Mesh, tmp_path: Path) -> None:
    roles = {"actor": new_actor(mesh).engine}
    said = "cannot write the checkpoint: File too large"
    with pytest.raises(UserError, match=said) as raised, small_files(size):
        checkpoint.save(tmp_path, roles, mesh, CheckpointMeta(1))
    assert (raised.value.where, raised.value.fix) == (str(tmp_path / "step_1"), "free some space")
    assert not list(tmp_path.iterdir())
    assert (checkpoint.save(tmp_path, roles, mesh, CheckpointMeta(1)) / "meta.json").exists()


def test_another_error_is_no_full_disk(mesh: Mesh, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.save(tmp_path, {}, mesh, CheckpointMeta(1), extra_files=fail)


def test_kind(folder: Path, tmp_path: Path) -> None:
    assert weights_kind(folder) == "checkpoint"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"found: config\.json"):
        weights_kind(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    assert weights_kind(tmp_path) == "huggingface"
    with pytest.raises(UserError, match=r"newest checkpoint is .*step_7"):
        weights_kind(folder.parent)
    with pytest.raises(UserError, match="nothing to load"):
        weights_kind(tmp_path / "missing")


def test_weights_by_role(folder: Path, mesh: Mesh) -> None:
    reward = engine("reward", mesh, seed=4)
    assert load_into(reward, str(folder), "reward") == "reward"
    critic = engine("critic", mesh, seed=5, group=GROUP)
    assert load_into(critic, str(folder), "critic") == "reward" and critic.group_head is not None
    theirs, ours = dict(reward.export()), dict(critic.export())
    # the score head is the value head
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in ours)
    reference = engine("reference", mesh, seed=6, optimisation=None)
    assert load_into(reference, str(folder), "reference") == "actor"


def test_a_new_reward_model_takes_the_actors_trunk(
    folder: Path, mesh: Mesh, tmp_path: Path
) -> None:
    actor = new_actor(mesh, optimisation=None)
    path = checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(1))
    fresh = dict(engine("reward", mesh, seed=5).export())
    reward = engine("reward", mesh, seed=5)
    assert load_into(reward, str(path), "reward") == "actor"
    trunk, ours = dict(actor.engine.export()), dict(reward.export())
    assert torch.equal(ours["score.weight"], fresh["score.weight"])
    assert torch.equal(
        ours["model.layers.3.mlp.up_proj.weight"], trunk["model.layers.3.mlp.up_proj.weight"]
    )


def test_a_group_head_comes_along_when_it_fits(mesh: Mesh, tmp_path: Path) -> None:
    critic = new_critic(mesh)
    critic.update((weighted(), critic_loss))
    path = checkpoint.save(tmp_path, {"critic": critic.engine}, mesh, CheckpointMeta(1))
    same = MegatronCritic(engine("critic", mesh, seed=8, load=str(path), group=GROUP))
    assert digest(same) == digest(critic)
    three = replace(GROUP, num_groups=3)
    wider = engine("critic", mesh, seed=8, load=str(path), group=three)
    assert wider.group_head is not None and wider.group_head.weight.shape == (3, 32)
    with pytest.raises(UserError, match="saved with 2 groups, this run has 3"):
        checkpoint.restore(path, {"critic": wider}, mesh)


def test_refusals(folder: Path, mesh: Mesh) -> None:
    deeper = replace(ARCHITECTURE, num_layers=2, norm_eps=1e-6)
    with pytest.raises(
        UserError, match="num_layers: there 4, here 2; norm_eps: there 1e-05, here 1e-06"
    ):
        engine("reward", mesh, load=str(folder), architecture=deeper)
    with pytest.raises(UserError, match="no 'critic'; it has actor, reward"):
        checkpoint.restore(folder, {"critic": new_critic(mesh).engine}, mesh)
    with pytest.raises(UserError, match="without its optimizer"):
        checkpoint.restore(folder, {"actor": new_actor(mesh).engine}, mesh)


# ------------------------------------------------------------------------------------ damaged files


def spoil(role: MegatronActor, value: float) -> None:
    """Put one number into a weight of layer 1, and into the optimizer's copy of it."""
    weights = dict(role.engine.chunks[0].named_parameters())
    weights["decoder.layers.1.mlp.linear_fc2.weight"].data[0, 0] = value
    role.engine.weights_changed()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(
    value: float, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = new_actor(mesh)
    sound = checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(1))
    spoil(actor, value)
    with pytest.raises(UserError) as error:
        checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(2))
    named = "NaN or infinity in decoder.layers.1.mlp.linear_fc2.weight"
    assert error.value.what == named and "learning rate" in error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]

    with monkeypatch.context() as unchecked:  # as a program without the check
        unchecked.setattr(checkpoint.writing, "check_finite", lambda *arguments: None)
        path = checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(3))
    again = new_actor(mesh, seed=3)
    with pytest.raises(UserError, match=named):
        checkpoint.restore(path, {"actor": again.engine}, mesh)
    with pytest.raises(UserError, match=named):
        engine("actor", mesh, load=str(path))
    checkpoint.restore(sound, {"actor": again.engine}, mesh)


def test_moments_that_are_not_finite(mesh: Mesh, tmp_path: Path) -> None:
    actor = new_actor(mesh)
    actor.engine.optimizer_tensors()[-1].view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity in the optimizer's state"):
        checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(1))


def test_a_tensor_that_is_not_there_is_named(mesh: Mesh, tmp_path: Path) -> None:
    actor = new_actor(mesh)
    path = checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(1))
    key = "decoder.layers.mlp.linear_fc2.weight"
    index = path / "actor" / ".metadata"
    stored = pickle.loads(index.read_bytes())
    del stored.state_dict_metadata[key]
    index.write_bytes(pickle.dumps(stored))
    meta = json.loads((path / "meta.json").read_text())
    meta["files"]["actor/.metadata"] = index.stat().st_size
    (path / "meta.json").write_text(json.dumps({**meta, "digests": None}))
    for read in (
        lambda: checkpoint.restore(path, {"actor": actor.engine}, mesh),
        lambda: engine("actor", mesh, load=str(path)),
    ):
        with pytest.raises(UserError, match=key) as error:
            read()
        assert str(path) in error.value.where and "copy it again" in error.value.fix


FILES = ("state.pt", "actor/.metadata", "actor/common.pt", "actor/__0_0.distcp")


@pytest.mark.parametrize("file", FILES)
def test_one_changed_bit_is_found(mesh: Mesh, tmp_path: Path, file: str) -> None:
    actor = new_actor(mesh)
    path = checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(1))
    content = bytearray((path / file).read_bytes())
    content[len(content) // 3] ^= 1
    (path / file).write_bytes(content)
    for read in (
        lambda: checkpoint.restore(path, {"actor": actor.engine}, mesh),
        lambda: engine("actor", mesh, load=str(path)),
    ):
        with pytest.raises(UserError, match=f"{file} has other content than was written") as error:
            read()
        assert error.value.where == str(path) and "copy it again" in error.value.fix


def test_a_role_that_is_not_read_may_be_damaged(mesh: Mesh, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "step_7"))
    damaged = copy / "reward" / "__0_0.distcp"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    engine("actor", mesh, load=str(copy))
    with pytest.raises(UserError, match=r"reward/__0_0.distcp has other content"):
        engine("critic", mesh, load=str(copy))


def test_equal_states_have_equal_files(mesh: Mesh, tmp_path: Path) -> None:
    actor = new_actor(mesh)
    found = []
    for name in ("a", "b"):
        roles = {"actor": actor.engine}
        path = checkpoint.save(tmp_path / name, roles, mesh, CheckpointMeta(1), {"position": 3})
        files = sorted(p for p in path.rglob("*") if p.is_file())
        found.append([(p.relative_to(path), p.read_bytes()) for p in files])
    assert found[0] == found[1]
    listed = json.loads((path / "meta.json").read_text())["digests"].keys()
    assert listed == {str(name) for name, _ in found[0]} - {"meta.json"} and set(FILES) <= listed


def test_the_disk_has_a_checkpoint_before_older_ones_go(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoint.save(tmp_path, {}, mesh, CheckpointMeta(1))
    synced: list[Path] = []

    def fsync(opened: int) -> None:
        assert first.exists(), "removed too early"
        synced.append(Path(os.readlink(f"/proc/self/fd/{opened}")))

    monkeypatch.setattr(os, "fsync", fsync)
    actor = new_actor(mesh)
    path = checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(2), keep=1)
    work = path.with_name("step_2.tmp")
    written = {work / p.relative_to(path) for p in path.rglob("*")} | {work}
    assert written <= set(synced) and synced[-1] == tmp_path and not first.exists()


def test_a_whole_model_is_not_resumed_with_adapters(mesh: Mesh, tmp_path: Path) -> None:
    actor = new_actor(mesh)
    path = checkpoint.save(tmp_path, {"actor": actor.engine}, mesh, CheckpointMeta(1))
    adapted = engine("actor", mesh, load=str(path), adapter=AdapterSpec(rank=4))
    with pytest.raises(UserError, match="saved as a whole model, and this run trains adapters"):
        checkpoint.restore(path, {"actor": adapted}, mesh)
