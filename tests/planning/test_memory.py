"""The planner's Device against offload.Residency: the same calls leave the same bytes on the
device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gipo_megatron.megatron import checkpoint
from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.meta_shard import Shard
from gipo_megatron.megatron.roles import MegatronActor, MegatronCritic, MegatronRewardModel
from gipo_megatron.planning.counting import count
from gipo_megatron.planning.memory import Device, State, budget, slot_of, staging
from gipo_megatron.recipe.compose import compose
from gipo_megatron.specs import Parallel, Precision
from gipo_megatron.weights.checkpoints import CheckpointMeta
from tests.parity.planning_cases import RECIPES, state_bytes
from tests.parity.roles import common, mine, parts_of
from tests.parity.tiny import weighted

OFFLOADED = {"actor": "cpu", "critic": "cpu", "reward": "none"}


def shard(role: Any) -> Shard:
    with role.engine.residency.use(training=True):
        weights, gradients, optimizer = state_bytes(role.engine)
    return Shard(0, 0, (4,), 0, weights, gradients, optimizer)


@pytest.mark.global_rng
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_calls_leave_the_same_bytes(dtype: str) -> None:
    mesh = Mesh.create(Parallel())
    arguments = common(mesh, precision=Precision(dtype))
    frozen = {key: value for key, value in arguments.items() if key != "optimisation"}
    away = build_engine("actor", **arguments, offload="cpu")
    actor = MegatronActor(away, eos_id=1, pad_id=0, decode=str)
    critic = MegatronCritic(build_engine("critic", **arguments, offload="cpu"))
    roles: dict[str, Any] = {
        "actor": actor,
        "critic": critic,
        "reward": MegatronRewardModel(build_engine("reward", **frozen)),
    }
    recipe: Any = SimpleNamespace(
        models={name: SimpleNamespace(offload=offload) for name, offload in OFFLOADED.items()}
    )
    device = Device(recipe, {name: shard(role) for name, role in roles.items()})
    device.present = {
        name: State() if OFFLOADED[name] == "cpu" else device.whole(name) for name in roles
    }
    device.use("critic", trains=True)  # the last that `shard` looked at of those that move

    rows = mine(mesh, weighted())
    calls: list[tuple[str, bool, Callable[[], Any]]] = [
        ("actor", False, lambda: actor.logprobs(rows)),
        ("reward", False, lambda: roles["reward"].score(rows)),
        ("critic", False, lambda: critic.evaluate(rows)),
        ("critic", True, lambda: critic.update(*parts_of("critic", mesh))),
        ("critic", False, lambda: critic.evaluate(rows)),
        ("actor", True, lambda: actor.update(*parts_of("actor", mesh))),
        ("actor", False, lambda: actor.logprobs(rows)),
        ("critic", False, lambda: critic.evaluate(rows)),
    ]
    for name, trains, call in calls * 2:
        device.use(name, trains)
        call()
        real = [
            sum(column)
            for column in zip(*(state_bytes(role.engine) for role in roles.values()), strict=True)
        ]
        assert [device.state.weights, device.state.gradients, device.state.optimizer] == real, (
            name,
            trains,
        )


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside have at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if (
                isinstance(t, torch.Tensor)
                and (storage := t.untyped_storage())._cdata not in before
            ):
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: found for key, found in self.live.items() if not found[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.global_rng
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_save_gathers_the_planned_bytes(dtype: str, tmp_path: Path) -> None:
    """One replica: 9 times the gradient buffer, and nothing else of that order, not even while it
    is written."""
    mesh = Mesh.create(Parallel())
    engine = build_engine("actor", **common(mesh, precision=Precision(dtype)))
    actor = MegatronActor(engine, eos_id=1, pad_id=0, decode=str)
    with LiveBytes() as seen:
        checkpoint.save(tmp_path, {"actor": engine}, mesh, CheckpointMeta(1))
    first, other = staging(shard(actor).gradients, 1)
    assert (first, other) == (9 * shard(actor).gradients, 3 * shard(actor).gradients)
    assert seen.most == pytest.approx(first, rel=0.01)


def test_bytes_moved_by_hand() -> None:
    """Weights 2, gradients 4, optimizer 12: gradients come back as zeros, everything else is
    copied, and only tensors on the device leave."""
    recipe: Any = SimpleNamespace(
        models={name: SimpleNamespace(offload="cpu") for name in ("actor", "critic")}
    )
    one = Shard(0, 0, (1,), 0, 2, 4, 12)
    device = Device(recipe, {"actor": one, "critic": one}, {"actor": State(), "critic": State()})
    moved = [
        device.use(*call)
        for call in (
            ("actor", True),
            ("actor", False),
            ("critic", False),
            ("critic", True),
            ("actor", False),
        )
    ]
    assert moved == [14, 0, 14 + 2, 12, 14 + 2]
    assert device.state == State(2, 0, 0)


@pytest.mark.global_rng  # imports what a recipe's names need
def test_a_gpus_micro_batch_is_as_wide_as_it_is_padded() -> None:
    """1000 tokens are 1024 on a GPU; on a CPU, and at a round length, nothing is added."""

    def length(*words: str) -> int:
        recipe = compose(words, RECIPES)
        return slot_of(count(recipe)).length

    assert length("recipe=hh_sft", "data.max_length=1000") == 1024
    assert length("recipe=hh_sft", "data.max_length=2048") == 2048
    assert length("recipe=tiny/sft", "data.max_length=100") == 100


@pytest.mark.global_rng  # imports what a recipe's names need
def test_the_largest_micro_batch_of_a_token_budget() -> None:
    """Full of rows at their longest; a budget that these do not fill, of shorter ones, too."""

    def sequences(*words: str) -> int:
        recipe = compose(words, RECIPES)
        return slot_of(count(recipe)).sequences

    assert sequences("recipe=hh_sft") == 8192 // 2048
    assert sequences("recipe=hh_rm") == 16384 // 2048
    assert sequences("recipe=tldr_sft") == 11  # 8192 / 768 = 10.7
    assert sequences("recipe=hh_sft", "batch.micro_tokens=2048") == 1
    assert sequences("recipe=hh_rm", "batch.micro_tokens=4096") == 2


def test_budget() -> None:
    assert budget(80) == 74 * 2**30, "5 % of 80 GiB, and 2 GiB, stay free"
