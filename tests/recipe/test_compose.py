from __future__ import annotations

from pathlib import Path

import pytest

from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.files import Files, find_recipe, parse_arguments, recipe_names
from gipo_megatron.recipe.problems import RecipeErrors
from gipo_megatron.recipe.source import leaves, plain
from tests.recipe.helpers import RECIPES, SMALL, problems, small, write


def test_arguments() -> None:
    words = [
        "recipe=hh_gipo",
        "with=hardware/cpu,data/hh",
        "world=4",
        "run.steps=3",
        "run.loggers=[a, b]",
        "data.path=",
        "run.steps=1e3",
    ]
    arguments = parse_arguments(words)
    assert (arguments.recipe, arguments.fragments, arguments.world) == (
        "hh_gipo",
        ["hardware/cpu", "data/hh"],
        4,
    )
    assert plain(arguments.overrides) == {
        "run": {"steps": 1000.0, "loggers": ["a", "b"]},
        "data": {"path": ""},
    }


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["run.steps=3"], "which recipe?"),
        (["recipe=a", "recipe=b"], "one recipe at a time"),
        (["recipe=a", "--steps=3"], "cannot read the argument '--steps=3'"),
        (["recipe=a", "steps"], "cannot read the argument 'steps'"),
        (["recipe=a", "run..steps=3"], "cannot read the argument"),
        (["recipe=a", "world=x"], "number of processes"),
        (["recipe=a", "run.loggers=[a"], "cannot read the value '[a'"),
    ],
)
def test_unreadable_arguments(words: list[str], what: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        parse_arguments(words)
    assert [what in p.what for p in caught.value.problems] == [True]


def test_defaults_depth_first_later_wins_child_over_all(tmp_path: Path) -> None:
    child = write(
        tmp_path,
        child="defaults: [left, right]\nd: child\n",
        left="defaults: [root]\na: left\nb: left\nd: left\n",
        right="b: right\nc: right\nd: right\n",
        root="a: root\nr: root\n",
    )
    files = Files(tmp_path)
    tree = files.load(child)
    assert not files.problems
    assert plain(tree) == {"a": "left", "r": "root", "b": "right", "c": "right", "d": "child"}
    origins = {
        path[0]: leaf.origin.removeprefix(f"{tmp_path.name}/") for path, leaf in leaves(tree)
    }
    assert origins == {
        "a": "left.yaml:2",
        "r": "root.yaml:2",
        "b": "right.yaml:1",
        "c": "right.yaml:2",
        "d": "child.yaml:2",
    }


def test_a_cycle_is_named(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.load(write(tmp_path, a="defaults: [b]\n", b="x: 1\ndefaults: [c]\n", c="defaults: [b]\n"))
    (problem,) = files.problems
    assert (
        "cycle" in problem.what
        and problem.what.count("b.yaml") == 2
        and "c.yaml:1" in problem.where
    )


def test_every_broken_file_is_named(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.load(write(tmp_path, a="defaults: [b, nope, c]\n", b="x: [\n", c="defaults: 3\n"))
    assert len(files.problems) == 3


def test_a_recipe_is_found_by_name_by_path_and_beside_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, mine="defaults: [./other]\n", other="x: 1\n")
    assert find_recipe("tiny/gipo", RECIPES) == RECIPES / "tiny" / "gipo.yaml"
    assert (
        find_recipe(str(path), RECIPES) == path
        and find_recipe(str(path.with_suffix("")), RECIPES) == path
    )
    assert plain(Files(RECIPES).load(path)) == {"x": 1}
    monkeypatch.chdir(tmp_path)
    assert find_recipe("mine", RECIPES) == Path("mine.yaml")
    with pytest.raises(ValueError, match="no recipe 'hh_gippo'") as caught:
        find_recipe("hh_gippo", RECIPES)
    assert "did you mean 'hh_gipo'?" in str(caught.value)
    assert "tiny/gipo" in recipe_names(RECIPES) and "base/gipo" not in recipe_names(RECIPES)


def test_fragments_come_after_the_recipe_and_overrides_after_them(tmp_path: Path) -> None:
    fragment = write(tmp_path, fragment="run: {steps: 7, seed: 7}\nparallel: {tensor: 2}\n")
    recipe = small(tmp_path, f"with={fragment}", "run.seed=9", world=2)
    assert (recipe.run.steps, recipe.run.seed, recipe.parallel.tensor) == (7, 9, 2)


def test_origins_of_file_fragment_override_and_default(tmp_path: Path) -> None:
    text = small(tmp_path, "run.seed=9").to_yaml()
    assert any(
        line.strip().startswith("seed: 9 ") and line.endswith("# command line")
        for line in text.splitlines()
    )
    assert any(
        line.strip().startswith("steps: 3 ") and line.endswith("small.yaml:6")
        for line in text.splitlines()
    )
    assert any(
        line.strip().startswith("keep: 2 ") and "# recipes/base/ppo.yaml:" in line
        for line in text.splitlines()
    )


def test_overrides_are_one_child_whatever_their_order(tmp_path: Path) -> None:
    for words in (
        ["algorithm.kl_controller.eta=0.2", "algorithm.kl_controller=fixed"],
        ["algorithm.kl_controller=fixed"],
    ):
        block = small(tmp_path, *words).algorithm["kl_controller"]
        assert block["name"] == "fixed" and set(block) == {"name", "eta"}
    swapped = small(
        tmp_path, "algorithm.kl_controller.name=fixed", "algorithm.kl_controller.eta=0.2"
    ).algorithm["kl_controller"]
    assert swapped == {"name": "fixed", "eta": 0.2}


def test_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "elsewhere")
    recipe = small(
        tmp_path, "run.dir=${oc.env:WHERE}/${run.seed}", "run.seed=4", "run.steps=${run.seed}"
    )
    assert (recipe.run.dir, recipe.run.steps) == ("elsewhere/4", 4)
    assert recipe.models["reference"].load == recipe.models["actor"].load == "random"
    found = problems(
        tmp_path,
        "run.dir=${nowhere.x}",
        "data.path=${oc.nothing:x}",
        "run.seed='${'",
        "run.steps=${data.format}",
    )
    assert sorted(p.key for p in found) == ["data.path", "run.dir", "run.seed", "run.steps"]


def test_what_an_interpolation_points_at_is_reported_once(tmp_path: Path) -> None:
    found = problems(tmp_path, text=SMALL.replace("  actor: {load: random}\n", ""))
    assert [(p.key, p.what) for p in found] == [("models.actor.load", "missing")]


def test_two_errors_at_once_with_file_key_and_suggestion(tmp_path: Path) -> None:
    text = SMALL + "algorithm:\n  variance_regulariser: {bta: 0.1}\n  kl_controller: {eta: high}\n"
    found = problems(tmp_path, text=text)
    assert [(p.key, p.where.rsplit("/", 1)[-1], p.fix) for p in found] == [
        ("algorithm.variance_regulariser.bta", "small.yaml:8", "did you mean 'beta'?"),
        ("algorithm.kl_controller.eta", "small.yaml:9", ""),
    ]


def test_the_expanded_recipe_is_a_recipe(tmp_path: Path) -> None:
    for base in ("base/gipo", "base/sft", "base/reward_model", "base/ppo"):
        recipe = small(tmp_path, "models.actor.load=random", text=SMALL.replace("base/gipo", base))
        again = small(tmp_path, text=recipe.to_yaml())
        sections = (
            "models",
            "model",
            "parallel",
            "precision",
            "memory",
            "batch",
            "algorithm",
            "data",
            "run",
            "evaluation",
            "hardware",
        )
        assert all(getattr(again, name) == getattr(recipe, name) for name in sections)
        assert plain(again.tree) == plain(recipe.tree)


def test_the_world_comes_from_the_words_then_the_caller_then_torchrun_then_the_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = f"recipe={write(tmp_path, small=SMALL)}"
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert compose([word], RECIPES).world == 1
    assert compose([word, "hardware.gpus=16"], RECIPES).world == 16
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert compose([word, "hardware.gpus=16"], RECIPES).world == 4
    assert compose([word], RECIPES, world=2).world == 2
    assert compose([word, "world=8"], RECIPES, world=2).world == 8


def test_a_wrong_algorithm_is_one_problem(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "algorithm.name=pppo")
    assert problem.fix == "did you mean 'ppo'?"
    found = problems(tmp_path, text=SMALL.replace("base/gipo, ", ""))
    assert [(p.key, p.what) for p in found] == [("algorithm.name", "missing")]


def test_plugins_that_cannot_be_imported_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_plugin_of_test.py").write_text("raise RuntimeError('boom')\n")
    found = problems(tmp_path, "plugins=[no_such_module_here, broken_plugin_of_test]", "run.stps=3")
    assert [p.key for p in found] == ["plugins", "plugins", "run.stps"]
    assert "boom" in found[1].what
