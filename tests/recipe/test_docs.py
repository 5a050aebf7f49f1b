"""The examples of docs/recipes.md run as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from gipo_megatron.recipe import registry
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.files import find_recipe
from gipo_megatron.recipe.problems import RecipeErrors
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_config import config_for
from tests.recipe.helpers import RECIPES

TEXT = (RECIPES.parent / "docs" / "recipes.md").read_text(encoding="utf-8")


def block(language: str, holds: str) -> str:
    (found,) = [
        text for text in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if holds in text
    ]
    return found


def test_the_plugin_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_kl.py").write_text(block("python", "FallingKL"))
    Path("my_run.yaml").write_text(block("yaml", "plugins"))
    recipe = compose(["recipe=my_run.yaml"], RECIPES)
    assert recipe.algorithm["kl_controller"] == {
        "name": "falling",
        "start": 0.1,
        "end": 0.02,
        "iterations": 100,
    }

    controller = registry.build("kl_controller", recipe.algorithm["kl_controller"], {})
    groups = type("FakeGroups", (), {"high_prob": torch.tensor([0.2, 0.9])})()
    assert controller.kl_coefficients(groups).tolist() == pytest.approx([0.1, 0.1])
    for _ in range(50):
        metrics = controller.observe(groups, 1.0)
    assert metrics["kl/eta"].result() == pytest.approx(0.06)
    again = registry.build("kl_controller", recipe.algorithm["kl_controller"], {})
    again.load_state_dict(controller.state_dict())
    assert again.eta == controller.eta == pytest.approx(0.06)

    for word, what in (
        ("strat=1", "did you mean 'start'?"),
        ("iterations=0", "at least 1"),
        ("end=0.5", "it would rise"),
    ):
        with pytest.raises(RecipeErrors, match="1 problem") as caught:
            compose(["recipe=my_run", f"algorithm.kl_controller.{word}"], RECIPES)
        assert what in str(caught.value)


def test_the_first_example_is_the_recipe_that_is_there() -> None:
    shown = [line for line in block("yaml", "hh_gipo").splitlines() if not line.startswith("#")]
    real = [
        line
        for line in find_recipe("hh_gipo", RECIPES).read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert shown == real


def test_every_section_is_described() -> None:
    sections = [
        f.name for f in (*registry.recipe_fields(Recipe), *registry.component_fields(Recipe))
    ]
    rows = re.findall(r"^\| `(\w+)", TEXT, re.MULTILINE)
    assert sorted(rows) == sorted(sections) and len(rows) == 13


def test_a_recipe_without_a_model_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_sft.yaml").write_text(block("yaml", "SFT from a folder"))
    architecture = Architecture(8, 64, 64, 8, 8, 8, 259, 4096)
    Path("models/llama").mkdir(parents=True)
    Path("models/llama/config.json").write_text(json.dumps(config_for(architecture, "bfloat16")))
    recipe = compose(["recipe=my_sft.yaml"], RECIPES)
    assert recipe.model.architecture == architecture
    assert (recipe.model.tokenizer, recipe.warnings) == ("", ())
