"""Assembly: a recipe builds the models that its page and components name, each once."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gipo_megatron.algorithms.pair_reference import LiveReference, PrecomputedReference
from gipo_megatron.data.planted import gold_reward
from gipo_megatron.errors import UserError
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.registry import Lazy
from gipo_megatron.training import assembly
from gipo_megatron.training.assembly import Assembly, assemble
from tests.data.fixtures import write_rows
from tests.recipe.helpers import small

SFT = """\
defaults: [base/sft, model/tiny, hardware/cpu]
models: {actor: {load: random}}
data: {format: planted, max_length: 64, max_response: 16}
run: {dir: runs/small, steps: 30}
"""
DPO = """\
defaults: [base/dpo, model/tiny, hardware/cpu]
models: {actor: {load: random}}
data: {format: planted, max_length: 64, max_response: 16}
run: {dir: runs/small, steps: 300}
"""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `build_engine` was called with, in order; no model is made."""
    calls: list[dict[str, Any]] = []

    def build(**settings: Any) -> Any:
        calls.append(settings)
        return SimpleNamespace(**settings)

    monkeypatch.setattr(assembly, "build_engine", build)
    return calls


def assembled(recipe: Recipe, mesh: Mesh) -> Assembly:
    return assemble(recipe, mesh, lambda phase: nullcontext())


def test_a_policy_alone(tmp_path: Path, mesh: Mesh, built: list[dict[str, Any]]) -> None:
    recipe = small(tmp_path, text=SFT)
    parts = assembled(recipe, mesh)
    assert [call["role"] for call in built] == ["actor"]
    assert parts.trained == {"actor": parts.algorithm.actor.engine}
    assert built[0]["optimisation"].total_steps == 30
    assert parts.algorithm.actor.temperature == 1.0
    assert parts.sequences_per_step == recipe.batch.minibatch


def test_steps_follow_from_the_rows_that_are_kept(
    tmp_path: Path, mesh: Mesh, built: list[dict[str, Any]]
) -> None:
    """7 of 8 rows are kept: two passes in batches of 4 are 4 steps, where the cosine ends, too."""
    rows = [{"prompt": f"q{i}", "response": "a" if i else ""} for i in range(8)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["data.format=sft", f"data.path={file}", "data.held_out=0", "run.eval_every=0"]
    words += ["run.steps=null", "run.epochs=2", "batch.minibatch=4", "batch.micro_batch=4"]
    words += ["models.actor.schedule=cosine", "models.actor.warmup_steps=3"]
    parts = assembled(small(tmp_path, *words, text=SFT), mesh)
    assert len(parts.train) == 7 and parts.steps == 4
    assert built[0]["optimisation"].total_steps == 4
    words[-1] = "models.actor.warmup_steps=4"
    with pytest.raises(UserError, match="ends at step 4, before its warm-up of 4"):
        assembled(small(tmp_path, *words, text=SFT), mesh)


def test_no_held_out_rows_without_evaluations(
    tmp_path: Path, mesh: Mesh, built: list[dict[str, Any]]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}])
    words = ["data.format=sft", f"data.path={file}", "data.held_out=0", "run.eval_every=0"]
    parts = assembled(small(tmp_path, *words, text=SFT), mesh)
    assert len(parts.train) == 1 and len(parts.held_out) == 0 and len(built) == 1
    with pytest.raises(UserError, match="no test rows left of 0"):
        assembled(small(tmp_path, *words[:-1], text=SFT), mesh)


def test_roles_share_the_model_of_their_adapters(
    tmp_path: Path, mesh: Mesh, built: list[dict[str, Any]]
) -> None:
    """All weights here are the same random ones; a role that is not trained has no adapters."""
    page = assembled(small(tmp_path, "model.adapter.rank=4"), mesh).algorithm
    calls = {call["role"]: call for call in built}
    ranks = {role: call["adapter"].rank for role, call in calls.items()}
    assert ranks == {"actor": 4, "critic": 4, "reference": 0, "reward": 0}
    assert page.actor.engine.base is not None
    assert all(call["base"] is page.actor.engine.base for call in built)


def test_whole_models_share_nothing(
    tmp_path: Path, mesh: Mesh, built: list[dict[str, Any]]
) -> None:
    assembled(small(tmp_path), mesh)
    assert len(built) == 4
    assert all(call["base"] is None and not call["adapter"].rank for call in built)


def test_roles_of_ppo(tmp_path: Path, mesh: Mesh, built: list[dict[str, Any]]) -> None:
    words = ["algorithm.rollout.temperature=0.7", "algorithm.epochs=2", "batch.prompts=8"]
    words += ["batch.responses=4", "batch.minibatch=16", "models.actor.schedule=constant"]
    recipe = small(tmp_path, *words)
    parts = assembled(recipe, mesh)
    page = parts.algorithm
    calls = {call["role"]: call for call in built}
    assert len(built) == 4 and calls.keys() == {"actor", "reference", "critic", "reward"}
    assert list(parts.trained) == ["actor", "critic"]
    # the critic's head is that of the page's own classifier; the actor's temperature the sampler's
    assert calls["critic"]["group"] is not None
    assert calls["critic"]["group"] == page.group_classifier.head
    assert page.actor.temperature == page.reference.temperature == page.rollout.temperature == 0.7
    # 3 iterations × 2 epochs × 32 / 16
    assert calls["critic"]["optimisation"].total_steps == 12
    assert calls["reward"]["optimisation"] is None is calls["reference"]["optimisation"]
    assert page.examples is None and parts.sequences_per_step == 32
    assert page.held_out.gold is gold_reward and page.sampling.seed == recipe.run.seed


def test_a_gold_model_where_the_recipe_gives_one(
    tmp_path: Path, mesh: Mesh, built: list[dict[str, Any]]
) -> None:
    """It is frozen, and no other part of the page has it."""
    assert assembled(small(tmp_path), mesh).algorithm.gold is None and len(built) == 4
    recipe = small(tmp_path, "models.gold.load=random", "models.gold.offload=cpu")
    page = assembled(recipe, mesh).algorithm
    (gold,) = [call for call in built if call["role"] == "gold"]
    assert len(built) == 9 and gold["optimisation"] is None and gold["offload"] == "cpu"
    assert page.gold.engine.role == "gold" and "gold" not in recipe.trained
    assert page.reward.reward_models.keys() == {"reward"}


def test_no_critic(tmp_path: Path, mesh: Mesh, built: list[dict[str, Any]]) -> None:
    recipe = replace(small(tmp_path), trained=("actor",))
    parts = assembled(recipe, mesh)
    assert parts.algorithm.critic is None and list(parts.trained) == ["actor"]
    assert "critic" not in [call["role"] for call in built]


@pytest.mark.parametrize("precompute", [True, False])
def test_the_reference_of_pairs(
    tmp_path: Path, mesh: Mesh, built: list[dict[str, Any]], precompute: bool
) -> None:
    """A precomputed one is built when it is first used."""
    recipe = small(tmp_path, f"algorithm.precompute={str(precompute).lower()}", text=DPO)
    reference = assembled(recipe, mesh).algorithm.reference
    roles = [call["role"] for call in built]
    if precompute:
        assert isinstance(reference, PrecomputedReference) and roles == ["actor"]
        reference.make()
    else:
        assert isinstance(reference, LiveReference)
    assert [call["role"] for call in built] == ["actor", "reference"]


def test_objects_are_made_once_and_when_read() -> None:
    made: list[str] = []
    table = Lazy({"a": lambda: made.append("a") or [1], "b": lambda: 1 / 0})
    assert "a" in table and "b" in table and "c" not in table and made == []
    assert table["a"] is table["a"] and made == ["a"] and list(table) == ["a", "b"]
    with pytest.raises(ZeroDivisionError):
        table["b"]
