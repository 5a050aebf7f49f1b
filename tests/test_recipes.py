"""Every recipe of the repository: it composes, it says no more than it must, and the base recipes are the whole manual."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gipo_megatron.recipe import registry
from gipo_megatron.recipe.compose import Files, compose, load_components, parse_arguments, recipe_names
from gipo_megatron.recipe.evaluation import compose_evaluation, is_evaluation
from gipo_megatron.recipe.schema import TRAINING_KEYS, Recipe
from gipo_megatron.recipe.source import DEFAULT, MISSING, Block, leaves, plain
from gipo_megatron.recipe.validate import Completion

RECIPES = Path(__file__).parent.parent / "recipes"
EVALUATIONS = [name for name in recipe_names(RECIPES) if is_evaluation(name)]
NAMES = [name for name in recipe_names(RECIPES) if name not in EVALUATIONS]
BASES = ("base/gipo", "base/ppo", "base/reward_model", "base/sft")
load_components(Block({}, "tests"))  # here, since a package that the components import may draw from a global generator

# What base recipes say otherwise than the dataclasses; {key: value}. Anything else is a default written down twice.
DELIBERATE = {
    "base/sft": {"models.actor.lr": 2e-5, "models.actor.warmup_steps": 50},
    "base/reward_model": {"models.reward.lr": 5e-6, "models.reward.warmup_steps": 50},
    "base/ppo": {
        "models.actor.lr": 5e-7,
        "models.actor.warmup_steps": 50,
        "models.reference.load": "${models.actor.load}",
        "models.critic.load": "${models.reward.load}",
        "models.critic.lr": 1.5e-6,
        "models.critic.warmup_steps": 50,
        "algorithm.group_classifier.detach_trunk": True,
    },
    "base/gipo": {
        "models.actor.lr": 5e-7,
        "models.actor.warmup_steps": 50,
        "models.reference.load": "${models.actor.load}",
        "models.critic.load": "${models.reward.load}",
        "models.critic.lr": 1.5e-6,
        "models.critic.warmup_steps": 50,
    },
}


def test_the_recipes_are_these() -> None:
    assert {"hh_sft", "hh_rm", "hh_ppo", "hh_ppo_kl", "hh_gipo", "hh_gipo_paper"} <= set(NAMES)
    assert {f"tiny/{name}" for name in ("sft", "rm", "ppo_kl", "gipo")} <= set(NAMES)
    assert len([name for name in NAMES if name.startswith("ablation/")]) == 8
    assert len(NAMES) >= 18


@pytest.mark.parametrize("name", NAMES)
def test_composes_and_checks(name: str) -> None:
    recipe = compose([f"recipe={name}"], RECIPES)
    assert all("is not on this machine" in warning for warning in recipe.warnings)
    assert recipe.world == (1 if name.startswith("tiny/") else 8)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_compose_and_check(name: str) -> None:
    recipe = compose_evaluation([f"recipe={name}"], RECIPES)
    assert all("is not on this machine" in warning for warning in recipe.warnings)
    assert recipe.world == (1 if name.startswith("tiny/") else 8)


def test_run_folders_are_distinct() -> None:
    folders = [compose([f"recipe={name}"], RECIPES).run.dir for name in NAMES]
    folders += [compose_evaluation([f"recipe={name}"], RECIPES).run.dir for name in EVALUATIONS]
    assert len(set(folders)) == len(NAMES) + len(EVALUATIONS) >= 20


def test_every_fragment_fits_a_recipe() -> None:
    fragments = [n for n in recipe_names(RECIPES, fragments=True) if n.split("/")[0] in ("model", "hardware", "data")]
    for fragment in fragments:
        compose(
            ["recipe=hh_gipo", f"with={fragment}", "data.path=x", "data.max_length=32", "data.max_response=10", "parallel.tensor=2"],
            RECIPES,
        )
    assert len(fragments) >= 10


@pytest.mark.parametrize(
    ("name", "world", "words"), [("tiny/gipo", 2, ["parallel.tensor=2"]), ("tiny/gipo", 2, ["parallel.pipeline=2"]), ("tiny/gipo", 2, [])]
)
def test_tiny_splits_over_two_processes(name: str, world: int, words: list[str]) -> None:
    assert compose([f"recipe={name}", *words], RECIPES, world=world).world == world


def test_children_state_only_differences() -> None:
    checked = 0
    for name in recipe_names(RECIPES, fragments=True):
        path, files = RECIPES / f"{name}.yaml", Files(RECIPES)
        own = files.own(path)
        inherited = dict(leaves(files.inherited(path, own)))
        for key, leaf in leaves(own):
            if key[0] != "defaults" and inherited:
                assert key not in inherited or inherited[key].value != leaf.value, (
                    f"{name} repeats {'.'.join(key)} of {inherited[key].origin}"
                )
                checked += 1
        assert not files.problems
    assert checked > 60


@pytest.mark.parametrize("base", BASES)
def test_a_base_lists_every_key_once_with_a_comment(base: str) -> None:
    own = Files(RECIPES).own(RECIPES / f"{base}.yaml")
    completion = Completion()
    complete = completion.complete(own, Recipe)
    assert {p.what for p in completion.problems} == {"missing"}, [str(p) for p in completion.problems]
    trained = {role for role in plain(own)["models"] if "lr" in plain(own)["models"][role]}
    unwritten = {".".join(key) for key, leaf in leaves(complete) if leaf.origin == DEFAULT}
    # What this algorithm refuses: optimisers of models it does not train, and a rollout's keys where there is none.
    refused = {f"models.{role}.{key}" for role in plain(own)["models"] if role not in trained for key in TRAINING_KEYS}
    if base in ("base/sft", "base/reward_model"):
        refused |= {"batch.prompts", "batch.responses", "run.stop.kl_above"} | {key for key in unwritten if key.startswith("evaluation.")}
    assert unwritten == refused
    lines = [
        line for line in (RECIPES / f"{base}.yaml").read_text().splitlines() if re.match(r" *\w+: .", line) and not line.startswith("#")
    ]
    values = [line for line in lines if not re.match(r" *\w+: +#", line)]
    assert len(values) == len([leaf for _, leaf in leaves(complete) if leaf.origin != DEFAULT]) > 60
    assert all("  # " in line for line in values)


@pytest.mark.parametrize("base", BASES)
def test_a_base_says_the_dataclass_defaults(base: str) -> None:
    own = Files(RECIPES).own(RECIPES / f"{base}.yaml")
    written = {".".join(key): leaf.value for key, leaf in leaves(own)}
    lines = [f"{key}={value}" for key, value in written.items() if key.startswith("algorithm.") and key.endswith("name")]
    lines += [f"models.{role}.offload=none" for role in plain(own)["models"]]
    bare = parse_arguments(["recipe=x", *lines]).overrides
    defaults = {".".join(key): leaf.value for key, leaf in leaves(Completion().complete(bare, Recipe))}
    different = {key: value for key, value in written.items() if defaults[key] != value and value != MISSING}
    assert different == DELIBERATE[base]
    assert len(written) > 60


def test_the_same_key_has_the_same_comment_everywhere() -> None:
    said: dict[tuple[str, ...], str] = {}
    repeated = 0
    for base in BASES:
        own = Files(RECIPES).own(RECIPES / f"{base}.yaml")
        lines = (RECIPES / f"{base}.yaml").read_text().splitlines()
        for key, leaf in leaves(own):
            comment = lines[int(leaf.origin.rsplit(":", 1)[1]) - 1].split("  # ", 1)[1]
            repeated += key in said
            assert said.setdefault(key, comment) == comment
    assert repeated > 150


def test_every_component_is_within_reach() -> None:
    """Each registered component of the package composes in place of GIPO's."""
    tried = 0
    for slot in ("group_classifier", "variance_regulariser", "kl_controller", "advantage", "rollout"):
        for name in registry.names(slot):
            recipe = compose(["recipe=tiny/gipo", f"algorithm.{slot}={name}"], RECIPES)
            assert recipe.algorithm[slot]["name"] == name
            tried += 1
    assert tried >= 15
