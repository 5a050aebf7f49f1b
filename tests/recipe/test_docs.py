"""The examples of docs/recipes.md and docs/add_*.md run as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gipo_megatron import registry
from gipo_megatron.recipe.compose import compose, load_components
from gipo_megatron.recipe.files import find_recipe
from gipo_megatron.recipe.problems import RecipeErrors
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.recipe.source import Block
from gipo_megatron.specs import Architecture
from gipo_megatron.weights.hf_config import config_for
from tests.recipe.helpers import RECIPES

DOCS = RECIPES.parent / "docs"
TEXT = (DOCS / "recipes.md").read_text(encoding="utf-8")


def block(language: str, holds: str, text: str = TEXT) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    (found,) = [block for block in blocks if holds in block]
    return found


def test_the_plugin_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (DOCS / "add_component.md").read_text(encoding="utf-8")
    Path("my_kl.py").write_text(block("python", "FallingKL", text))
    Path("my_run.yaml").write_text(block("yaml", "plugins", text))
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


def test_the_component_without_memory_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (DOCS / "add_component.md").read_text(encoding="utf-8")
    Path("my_weights.py").write_text(block("python", "HardestHalf", text))
    words = ["plugins=[my_weights]", "algorithm.variance_regulariser.name=hardest_half"]
    recipe = compose(["recipe=tiny/gipo", *words], RECIPES)
    expanded = recipe.algorithm["variance_regulariser"]
    assert expanded == {"name": "hardest_half", "threshold": 0.5}
    component = registry.build("variance_regulariser", expanded, {})
    groups = type("FakeGroups", (), {"high_prob": torch.tensor([0.2, 0.5, 0.9])})()
    assert component.weights(groups).values.tolist() == [2.0, 0.0, 0.0]


def test_the_algorithm_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, power 1: means 2 and 4 of the rows' nats, each row one unit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (DOCS / "add_algorithm.md").read_text(encoding="utf-8")
    Path("response_sft.py").write_text(block("python", "ResponseSFT", text))
    Path("my_sft.yaml").write_text(block("yaml", "plugins", text))
    recipe = compose(["recipe=my_sft.yaml"], RECIPES)
    assert recipe.algorithm == {"name": "response_sft", "power": 0.5}
    assert recipe.trained == ("actor",)

    runtime = dict.fromkeys(("actor", "examples", "held_out", "timer"))
    page = registry.build("algorithm", {"name": "response_sft", "power": 1.0}, runtime)
    output = SimpleNamespace(logprobs=-torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 5.0]]))
    batch = SimpleNamespace(mask=torch.tensor([[True, True, True], [True, False, False]]))
    loss = page.loss(output, batch)
    assert (float(loss.terms["nll"][0]), loss.terms["nll"][1]) == (6.0, "sequence")
    assert loss.metrics["loss"].result() == 3.0


def test_the_table_of_slots_names_every_shipped_component() -> None:
    text = (DOCS / "add_component.md").read_text(encoding="utf-8")
    load_components(Block({}, "tests"))
    rows = {row[0]: row[2] for row in re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", text, re.M)}
    found = {slot: set(re.findall(r"`(\w+)`", names)) for slot, names in rows.items()}
    for slot in found.keys() - {"judge"}:
        kinds = {name: registry.lookup(slot, name) for name in registry.names(slot)}
        own = {n for n, kind in kinds.items() if str(kind.__module__).startswith("gipo_megatron.")}
        assert found[slot] == own, slot
    assert len(found) == 7


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
