"""Every recipe of the repository, found by itself: it composes, writes only what differs, and its
head has the command that starts it. The base recipes list every key at its default."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gipo_megatron import registry
from gipo_megatron.commands.recipe import composed, differences
from gipo_megatron.evaluation.recipe import EvaluationRecipe, compose_evaluation, is_evaluation
from gipo_megatron.recipe.compose import compose, load_components
from gipo_megatron.recipe.files import Files, recipe_names
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.recipe.source import DEFAULT, MISSING, Block, Leaf, dump_value, leaves
from gipo_megatron.recipe.validate import Validation
from tests import golden
from tests.smollm import HOME, beside_the_model

RECIPES = Path(__file__).parent.parent / "recipes"
ALL = recipe_names(RECIPES, fragments=True)
EVALUATIONS = [n for n in recipe_names(RECIPES) if is_evaluation([f"recipe={n}"], RECIPES)]
NAMES = [name for name in recipe_names(RECIPES) if name not in EVALUATIONS]
BASES = [name for name in ALL if name.startswith("base/")]
# data sets with PPO, PPO-KL and GIPO beside each other
COMPARED = [n[: -len("_gipo")] for n in NAMES if f"{n[:-5]}_ppo" in NAMES and n.endswith("_gipo")]
# here, since a package that the components import may draw from a global generator
load_components(Block({}, "tests"))


@pytest.fixture(autouse=True, scope="module")
def beside() -> Iterator[None]:
    """recipes/smollm write no architecture: it is their model's."""
    with beside_the_model():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_composes_and_checks(name: str) -> None:
    recipe = compose([f"recipe={name}"], RECIPES)
    assert all("is not on this machine" in warning for warning in recipe.warnings)
    assert recipe.world == max(1, recipe.hardware.gpus)


def test_recipes_are_found() -> None:
    assert (len(NAMES), len(EVALUATIONS), len(BASES), len(COMPARED)) >= (49, 3, 6, 4)


def test_every_weight_comes_from_a_recipe() -> None:
    """What a recipe loads is random, its model on the hub, or the end of a recipe of the same model
    and data."""
    recipes = {name: compose([f"recipe={name}"], RECIPES) for name in NAMES}
    made = {f"{recipe.run.dir}/final": name for name, recipe in recipes.items()}
    # The 70B stages are hh_sft and hh_rm with other fragments, as the recipe's first lines say.
    made |= {f"runs/hh_{stage}_70b/final": "hh_gipo_70b" for stage in ("sft", "rm")}
    seen = 0
    for name, recipe in recipes.items():
        for role, model in recipe.models.items():
            if model.load not in ("random", recipe.model.hub):
                maker = recipes[made[model.load]]
                assert maker.model == recipe.model, (name, role)
                assert maker.data.source == recipe.data.source and (
                    name.startswith("tiny/") or maker.data.path[:8] == recipe.data.path[:8]
                )
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("stage", ["hh_sft", "hh_rm"])
def test_the_70b_stages_before_gipo(stage: str) -> None:
    words = ["with=model/llama3_1_70b,hardware/h100x512", "batch.micro_tokens=4096"]
    assert compose([f"recipe={stage}", *words], RECIPES).world == 512


@pytest.mark.parametrize("data", COMPARED)
def test_systems_differ_in_their_components_alone(data: str) -> None:
    """GIPO is PPO with KL with three components exchanged; PPO without KL lacks the KL penalty;
    all three have a group head."""
    ppo, ppo_kl, gipo = (
        compose([f"recipe={data}_{name}"], RECIPES) for name in ("ppo", "ppo_kl", "gipo")
    )
    keys = [key for key, _, _ in differences(ppo_kl.tree, gipo.tree)]
    slots = ("group_classifier.detach_trunk", "variance_regulariser", "kl_controller")
    assert keys == [*(f"algorithm.{slot}" for slot in slots), "run.dir"]
    assert [key for key, _, _ in differences(ppo.tree, ppo_kl.tree)] == [
        "algorithm.kl_controller",
        "run.dir",
    ]
    assert all(
        r.algorithm["group_classifier"]["detach_trunk"]
        and r.algorithm["variance_regulariser"]["name"] == "none"
        for r in (ppo, ppo_kl)
    )
    assert {r.algorithm["group_classifier"]["name"] for r in (ppo, ppo_kl, gipo)} == {"critic_head"}


def test_golden_expansions() -> None:
    """A changed default shows here, and in the review. Deliberate? `python -m tests.golden` writes
    the file anew."""
    now, kept = golden.text().splitlines(), golden.FILE.read_text(encoding="utf-8").splitlines()
    different = list(difflib.unified_diff(kept, now, "kept", "now", lineterm="", n=2))
    assert not different, "\n".join([*different, "", "if this is meant: python -m tests.golden"])
    assert sum(line.startswith("[") for line in now) == len(NAMES) + len(BASES) + len(EVALUATIONS)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_compose_and_check(name: str) -> None:
    recipe = compose_evaluation([f"recipe={name}"], RECIPES)
    assert all("is not on this machine" in warning for warning in recipe.warnings)
    assert recipe.world == (1 if name.startswith("tiny/") else 8)


def test_run_folders_are_distinct() -> None:
    folders = [compose([f"recipe={name}"], RECIPES).run.dir for name in NAMES]
    folders += [compose_evaluation([f"recipe={name}"], RECIPES).run.dir for name in EVALUATIONS]
    assert len(set(folders)) == len(NAMES) + len(EVALUATIONS)


# What a fragment needs beside it to fit hh_gipo.
BESIDE = {
    "model/from_weights": [f"models.actor.load={HOME}", "parallel={tensor: 1, sequence: false}"],
    "model/tiny": ["parallel.tensor=2", "data.max_length=512", "data.max_response=128"],
    "model/two_layers": ["parallel.tensor=2", "data.max_length=512", "data.max_response=128"],
    "data/jsonl": ["data.path=x"],
}


def test_every_fragment_fits_a_recipe() -> None:
    fragments = [
        n
        for n in recipe_names(RECIPES, fragments=True)
        if n.split("/")[0] in ("model", "hardware", "data")
    ]
    for fragment in fragments:
        recipe = compose(["recipe=hh_gipo", f"with={fragment}", *BESIDE.get(fragment, [])], RECIPES)
        if (
            fragment.startswith("data/")
            and not fragment.startswith("data/hh")
            and recipe.data.format != "planted"
        ):
            assert recipe.data.source == []  # none of the data before it stays behind
    assert len(fragments) >= 21


def test_models_split_over_machines() -> None:
    """Heads, layers and batches divide; whether the memory suffices is not asked."""
    composed = 0
    for model in ("llama2_7b", "llama3_1_8b", "mistral_7b", "qwen2_5_7b"):
        for hardware in ("h100x1", "h100x8", "h100x8_fp8", "h100x64"):
            composed += compose(
                ["recipe=hh_gipo", f"with=model/{model},hardware/{hardware}"], RECIPES
            ).world in (1, 8, 64)
    assert composed == 16


@pytest.mark.parametrize(
    ("name", "world", "words"),
    [
        ("tiny/gipo", 2, ["parallel.tensor=2"]),
        ("tiny/gipo", 2, ["parallel.pipeline=2"]),
        ("tiny/gipo", 2, []),
    ],
)
def test_tiny_splits_over_two_processes(name: str, world: int, words: list[str]) -> None:
    assert compose([f"recipe={name}", *words], RECIPES, world=world).world == world


def commands(name: str) -> list[tuple[list[str], int]]:
    """(words, processes) of each command in the head of a recipe."""
    file = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    head = re.match(r"(#.*\n)*", file)
    assert head is not None
    text = re.sub(r"\n# {8,}(?=\S+=)", " ", head[0])  # continued lines
    found = re.findall(r"(torchrun.*?)? ?launch/(?:train|evaluate)\.py((?: \S+=\S+)+)", text)
    return [
        (
            words.split(),
            math.prod(map(int, re.findall(r"--(?:nnodes|nproc-per-node) (\d+)", launcher))),
        )
        for launcher, words in found
    ]


@pytest.mark.parametrize("name", recipe_names(RECIPES))
def test_the_head_starts_the_recipe(name: str) -> None:
    """Every command in the head composes; one of them is of the recipe itself."""
    found = commands(name)
    assert f"recipe={name}" in [words[0] for words, _ in found]
    for words, processes in found:
        own = composed(words[0].removeprefix("recipe="), [])
        recipe = composed(words[0].removeprefix("recipe="), [*words[1:], f"world={processes}"])
        assert len(words) > 1 or recipe.world == own.world


def test_smollms_chain_and_its_two_judges() -> None:
    """Every stage starts where the one before it ends; the second judge sees other conversations
    than the first judge and the policies, which are anchored to the chosen responses."""
    sft, rm, gold, gipo, ppo_kl, dpo = recipes = [
        compose([f"recipe=smollm/{name}"], RECIPES)
        for name in ("sft", "rm", "rm_gold", "gipo", "ppo_kl", "dpo")
    ]
    assert Path(sft.models["actor"].load) == Path(HOME)
    assert {
        r.models[role].load
        for r, role in ((rm, "reward"), (gold, "reward"), (gipo, "actor"), (dpo, "actor"))
    } == {f"{sft.run.dir}/final"}
    assert gipo.models["reward"].load == gipo.models["critic"].load == f"{rm.run.dir}/final"
    assert gold.run.seed != rm.run.seed
    assert [r.data.part for r in recipes] == ["3/3", "1/3", "2/3", "3/3", "3/3", "1/3"]
    assert {r.algorithm["reward"]["anchor"] for r in (gipo, ppo_kl)} == {"chosen"}
    assert {r.algorithm["centre"] for r in (rm, gold)} == {0.01}
    assert {r.data.template for r in recipes} == {"chat"}


def test_children_state_only_differences() -> None:
    checked = 0
    for name in recipe_names(RECIPES, fragments=True):
        path, files = RECIPES / f"{name}.yaml", Files(RECIPES)
        own = files.own(path)
        inherited = dict(leaves(files.inherited(path, own)))
        for key, leaf in leaves(own):
            exchanged = own.written(".".join((*key[:-1], "name")))  # the whole component is written
            if key[0] != "defaults" and inherited and not exchanged:
                assert key not in inherited or inherited[key].value != leaf.value, (
                    f"{name} repeats {'.'.join(key)} of {inherited[key].origin}"
                )
                checked += 1
        assert not files.problems
    assert checked > 60


def keys_and_comments(base: str) -> dict[str, tuple[Leaf, str]]:
    """Every key of a base recipe and of those below it: (leaf, its comment)."""
    found: dict[str, tuple[Leaf, str]] = {}
    for path, leaf in leaves(Files(RECIPES).load(RECIPES / f"{base}.yaml")):
        file, line = leaf.origin.rsplit(":", 1)
        text = (RECIPES.parent / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        found[".".join(path)] = leaf, text.partition("  # ")[2]
    return found


@pytest.mark.parametrize("base", BASES)
def test_a_base_lists_every_key_at_its_default_with_a_comment(base: str) -> None:
    """The default of the dataclass, unless the comment ends in that default or there is none."""
    written = keys_and_comments(base)
    tree = Files(RECIPES).load(RECIPES / f"{base}.yaml")
    cls = EvaluationRecipe if "policies" in tree.children else Recipe
    validation = Validation()
    complete, _ = validation.block(tree, cls)
    assert {p.what for p in validation.problems} == {"missing"}
    read = golden.read_by(cls, complete)
    unwritten = {".".join(path) for path, leaf in leaves(read) if leaf.origin == DEFAULT}
    assert unwritten == set() and all(comment for _, comment in written.values())

    choices = {
        key: leaf
        for key, (leaf, _) in written.items()
        if key.split(".")[-1] == "name" or (key.startswith("models.") and key.endswith(".load"))
    }
    bare, _ = Validation().block(nested(choices), cls)
    different = 0
    for key, (leaf, comment) in written.items():
        default = bare.value(key)
        if leaf.value != default and default not in (None, MISSING) and leaf.value != MISSING:
            assert comment.endswith(f"(default: {dump_value(default)})"), (key, default, leaf)
            different += 1
    assert len(written) > 35 and different <= 1


def nested(flat: dict[str, Leaf]) -> Block:
    """The tree of dotted keys."""
    tree: dict[str, Any] = {}
    for key, leaf in flat.items():
        *above, last = key.split(".")
        functools.reduce(lambda node, part: node.setdefault(part, {}), above, tree)[last] = leaf
    return block_of(tree)


def block_of(tree: dict[str, Any]) -> Block:
    return Block({k: block_of(v) if isinstance(v, dict) else v for k, v in tree.items()}, "")


def test_the_same_key_has_the_same_comment_everywhere() -> None:
    comments: dict[str, str] = {}
    repeated = 0
    for base in BASES:
        if base == "base/evaluate":
            continue  # its models and generation are others
        for key, (_, comment) in keys_and_comments(base).items():
            comment = comment.partition(" (default: ")[0]
            repeated += key in comments
            assert comments.setdefault(key, comment) == comment, key
    assert repeated > 150


def test_every_component_is_within_reach() -> None:
    """Each registered component of the package composes in place of GIPO's."""
    tried = 0
    for slot in (
        "group_classifier",
        "variance_regulariser",
        "kl_controller",
        "advantage",
        "rollout",
    ):
        for name in registry.names(slot):
            recipe = compose(["recipe=tiny/gipo", f"algorithm.{slot}={name}"], RECIPES)
            assert recipe.algorithm[slot]["name"] == name
            tried += 1
    assert tried >= 15
