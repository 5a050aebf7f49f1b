"""Checkpoints in one process: what is on disk, what is found, what is refused. Other layouts are in
tests/parity/test_training.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gipo_megatron.errors import UserError
from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.build import load_into
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.roles import MegatronCritic
from gipo_megatron.weights.checkpoints import CheckpointMeta, latest, weights_kind
from tests.parity.roles import digest, engine, new_actor, new_critic, new_reward
from tests.parity.tiny import ARCHITECTURE, GROUP, critic_loss, pair_loss, pairs, weighted

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
    (path / "meta.json").write_text(json.dumps({**meta, "version": 1}))
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
