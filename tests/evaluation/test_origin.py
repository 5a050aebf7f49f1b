"""Policies that were trained against the reward model that judges them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gipo_megatron.evaluation.judges import openai, reward_model
from gipo_megatron.evaluation.origin import not_independent

LEARNED, SERVED = reward_model.RewardModelJudge.name, openai.OpenAIJudge.name


def run(root: Path, name: str, models: str) -> Path:
    """A run in ROOT/runs/NAME, with one checkpoint and an export. Its recipe's paths begin at
    ROOT."""
    folder = root / "runs" / name
    checkpoint = folder / "checkpoints" / "step_3"
    checkpoint.mkdir(parents=True)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    (checkpoint / "meta.json").write_text("{}")
    for place in (folder, checkpoint):
        recipe = f"models: {{actor: {{load: runs/sft/final}}{models}}}\nrun: {{dir: runs/{name}}}\n"
        (place / "recipe.yaml").write_text(recipe)
    (folder / "final").symlink_to(checkpoint)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run(tmp_path, "sft", "")
    run(tmp_path, "rm", "")
    run(tmp_path, "gold", "")
    run(tmp_path, "ppo", ", reward: {load: runs/rm/final}, critic: {load: runs/gold/final}")
    run(tmp_path, "both", ", reward_a: {load: runs/rm/final}, reward_b: {load: owner/rm}")
    return tmp_path


def warned(judge: str, *policies: str, name: str = LEARNED) -> list[str]:
    recipe: Any = SimpleNamespace(
        policies={str(i): SimpleNamespace(load=load) for i, load in enumerate(policies)},
        models={"reward": SimpleNamespace(load=judge)},
        judge={"name": name},
    )
    return [policies[int(text.split()[0])] for text in not_independent(recipe)]


@pytest.mark.parametrize("form", ["final", "checkpoints/step_3", "hf"])
def test_whatever_form_of_a_run_is_named(root: Path, form: str) -> None:
    """A policy's own recipe shows which reward model it was trained against."""
    policies = [f"{root}/runs/{name}/{form}" for name in ("sft", "ppo", "both")]
    assert warned(f"{root}/runs/rm/{form}", *policies) == policies[1:]
    assert warned(f"{root}/runs/gold/{form}", *policies) == []
    assert warned(f"{root}/runs/rm/{form}", *policies, name=SERVED) == []


def test_relative_paths_and_hub_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    policies = ["runs/sft/final", "runs/ppo/final", "runs/both/final"]
    assert warned("runs/rm/final", *policies) == policies[1:]
    assert warned("owner/rm", *policies) == policies[2:]


def test_a_home_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    home = run(root, "at_home", ", reward: {load: ~/runs/rm/final}")
    assert warned(f"{root}/runs/rm/final", str(home)) == [str(home)]


def test_a_checkpoint_that_has_left_its_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe's paths then begin where the evaluation is started."""
    moved = (root / "runs" / "ppo" / "checkpoints" / "step_3").rename(root / "policy")
    monkeypatch.chdir(root)
    assert warned("runs/rm/final", str(moved)) == [str(moved)]


def test_weights_without_a_record(root: Path) -> None:
    """A converted model has no recipe; another program's recipe.yaml is not read."""
    converted, foreign = root / "converted", root / "foreign"
    for folder, mark in ((converted, "meta.json"), (foreign, "config.json")):
        folder.mkdir()
        (folder / mark).write_text("{}")
    (foreign / "recipe.yaml").write_text("- a list: of another program\n")
    assert warned(f"{root}/runs/rm/final", str(converted), str(foreign), "owner/policy") == []
