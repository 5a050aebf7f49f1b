"""Recipes of launch/evaluate.py: the schema, and every problem at once."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from gipo_megatron.evaluation.recipe import (
    EvaluationRecipe,
    Weights,
    compose_evaluation,
    is_evaluation,
    missing_weights,
)
from gipo_megatron.evaluation.tasks import Task
from gipo_megatron.recipe.problems import Problem, RecipeErrors
from gipo_megatron.recipe.source import plain
from gipo_megatron.specs import Architecture
from tests.recipe.helpers import RECIPES, write

SMALL = """\
defaults: [base/evaluate, model/tiny, hardware/cpu]
policies:
  a: {load: runs/a/final}
  b: {load: runs/b/final}
  c: {load: runs/c/final}
models:
  reward: {load: runs/rm/final}
tasks:
  - {name: one, kind: helpful, data: x.jsonl, prompts: 4}
  - name: two
    kind: summary
    data: y.jsonl
    prompts: 5
    template: plain
    source: [z]
    max_length: 600
judge: reward_model
run: {dir: runs/small}
"""


def small(folder: Path, *words: str, text: str = SMALL, world: int = 1) -> EvaluationRecipe:
    return compose_evaluation([f"recipe={write(folder, small=text)}", *words], RECIPES, world=world)


def problems(folder: Path, *words: str, text: str = SMALL, world: int = 1) -> list[Problem]:
    with pytest.raises(RecipeErrors) as caught:
        small(folder, *words, text=text, world=world)
    return list(caught.value.problems)


def test_a_recipe_becomes_what_it_says(tmp_path: Path) -> None:
    recipe = small(tmp_path, "generation.temperature=0", "parallel.tensor=2", world=4)
    assert (recipe.subject, recipe.opponents, recipe.data_parallel) == ("a", ["b", "c"], 2)
    assert recipe.policies["b"] == Weights("runs/b/final") and recipe.models == {
        "reward": Weights("runs/rm/final")
    }
    assert recipe.tasks[0] == Task("one", "helpful", "x.jsonl", 4)
    assert recipe.tasks[1] == Task("two", "summary", "y.jsonl", 5, "plain", ["z"], 600)
    assert (
        recipe.generation.temperature,
        recipe.generation.max_response,
        recipe.report.bootstrap,
    ) == (0.0, 512, 2000)
    assert recipe.judge["name"] == "reward_model" and recipe.precision.dtype == "fp32"
    assert small(tmp_path, "opponents=[c]").opponents == ["c"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["batch.micro_tokens=9999"], "9999, and batch.micro_batch 4: only one of them can be set"),
        (["batch.micro_batch=null"], "missing, and so is batch.micro_batch"),
        (
            ["batch.micro_batch=null", "batch.micro_tokens=1023"],
            "1023 has no room for a row of a task's max_length = 1024 tokens",
        ),
    ],
)
def test_rows_or_tokens_of_a_micro_batch(tmp_path: Path, words: list[str], what: str) -> None:
    """The longest row is that of the first task, 1024 tokens by default."""
    (problem,) = problems(tmp_path, *words)
    assert (problem.key, problem.what) == ("batch.micro_tokens", what)


def test_the_sampler_has_the_keys_that_an_evaluation_reads(tmp_path: Path) -> None:
    recipe = small(tmp_path, "rollout={name: vllm, url: 'http://a:1'}")
    assert recipe.rollout["url"] == "http://a:1"
    shown = plain(recipe.tree)["rollout"]
    assert shown.keys() == {"name", "url", "serve", "transfer", "timeout"}
    assert plain(small(tmp_path).tree)["rollout"] == {"name": "sampling"}
    assert small(tmp_path, text=recipe.to_yaml()).rollout == recipe.rollout


def test_the_expanded_recipe_is_a_recipe(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    again = small(tmp_path, text=recipe.to_yaml())
    assert (
        plain(again.tree) == plain(recipe.tree)
        and again.tasks == recipe.tasks
        and again.judge == recipe.judge
    )
    assert "small.yaml:9" in recipe.to_yaml()  # the tasks' origin


WRONG = [
    (
        ["policies.d.laod=x"],
        [("policies.d.laod", "unknown key", "'load'"), ("policies.d.load", "missing", "")],
    ),
    (["opponents=[bb]"], [("opponents", "there is no policy 'bb'", "'b'")]),
    (["opponents=[a]"], [("opponents", "'a' is the subject", "remove")]),
    (["opponents=[b, b]"], [("opponents", "'b' is listed 2 times", "")]),
    (["policies.d/e.load=x"], [("policies.d/e", "file name", "")]),
    (
        ["policies.d.load=random"],
        [("policies.d.load", "cannot evaluate random", "checkpoint")],
    ),
    (["tasks=[]"], [("tasks", "none", "name: hh_harmless")]),
    (["tasks=3"], [("tasks", "needs a list", "")]),
    (["tasks=[3]"], [("tasks[0]", "needs a block of keys", "")]),
    (
        ["tasks=[{name: x, data: y, prompts: 1, knd: helpful}]"],
        [("tasks[0].knd", "unknown key", "'kind'"), ("tasks[0].kind", "missing", "")],
    ),
    (
        ["tasks=[{name: x, data: y, prompts: 0, kind: funny}]"],
        [("tasks[0].kind", "not one of helpful", ""), ("tasks[0].prompts", "0 must", "")],
    ),
    (
        [
            "tasks=[{name: x, data: y, prompts: 1, kind: helpful}, {name: x, data: z, prompts: 1,"
            " kind: helpful}]"
        ],
        [("tasks", "2 tasks are called 'x'", "")],
    ),
    (["generation.max_response=600"], [("tasks[1].max_length", "600 leaves no room", "")]),
    (["model.architecture.max_positions=900"], [("tasks[0].max_length", "1024 exceeds", "")]),
    (["models.rewards.load=x"], [("models.rewards", "unknown role", "'reward'")]),
    (
        ["judge=reword_model"],
        [("judge.name", "there is no judge 'reword_model'", "'reward_model'")],
    ),
    (["judge.tie_margn=1"], [("judge.tie_margn", "unknown key", "")]),
    (
        ["parallel.tensor=3"],
        [
            ("parallel", "tensor 3 × pipeline 1 × data ? ≠ world 1", "multiple"),
            ("model.architecture.num_heads", "", ""),
            *[("model.architecture.num_kv_heads", "", "")],
        ],
    ),
    (["run.dir="], [("run.dir", "is empty", "")]),
    (
        ["rollout={name: sampling, temperature: 0.5, top_k: 3, max_response: 8}"],
        [
            ("rollout.temperature", "0.5 is not read", "generation.temperature=0.5"),
            ("rollout.top_k", "3 is not read", "generation.top_k=3"),
            ("rollout.max_response", "8 is not read", "generation.max_response=8"),
        ],
    ),
    (
        ["rollout={name: vllm, correction: truncated}"],
        [("rollout.correction", "'truncated' is not read", "remove it")],
    ),
    (["rollout.url=http://a"], [("rollout.url", "does not read it", "vllm")]),
    (["rollout=vlm"], [("rollout.name", "there is no rollout 'vlm'", "'vllm'")]),
    (
        ["batch.prompts=3", "run.steps=3", "algorithm=ppo"],
        [
            ("algorithm", "unknown key", ""),
            ("batch.prompts", "unknown", ""),
            ("run.steps", "unknown", ""),
        ],
    ),
]


@pytest.mark.parametrize(
    ("words", "expected"), WRONG, ids=lambda value: value[0] if isinstance(value[0], str) else ""
)
def test_problems_name_key_and_remedy(
    tmp_path: Path, words: list[str], expected: list[tuple[str, str, str]]
) -> None:
    found = {p.key: p for p in problems(tmp_path, *words)}
    assert set(found) == {key for key, _, _ in expected}, [str(p) for p in found.values()]
    assert all(what in found[key].what and fix in found[key].fix for key, what, fix in expected), [
        str(p) for p in found.values()
    ]


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (
        SMALL.replace("kind: helpful", "kind: nice")
        .replace("run: {dir: runs/small}", "run: {dri: x}")
        .replace("  reward:", "  rewrd:")
    )
    found = problems(tmp_path, text=text)
    assert sorted(p.key for p in found) == [
        "judge.name",
        "models.rewrd",
        "run.dir",
        "run.dri",
        "tasks[0].kind",
    ]
    assert {p.key: p.where.rsplit("/", 1)[-1] for p in found}["tasks[0].kind"] == "small.yaml:9"


def test_no_policies(tmp_path: Path) -> None:
    text = re.sub(r"policies:\n.*models:\n", "models:\n", SMALL, flags=re.DOTALL)
    assert "policies" in [p.key for p in problems(tmp_path, text=text)]
    one = SMALL.replace("  b: {load: runs/b/final}\n  c: {load: runs/c/final}\n", "")
    assert ["needs one other" in p.what for p in problems(tmp_path, text=one)] == [True]


def test_a_reward_model_judge_needs_a_reward_model(tmp_path: Path) -> None:
    text = SMALL.replace("models:\n  reward: {load: runs/rm/final}\n", "")
    assert [p.key for p in problems(tmp_path, text=text)] == ["judge.name"]
    assert small(tmp_path, "judge=human", text=text).judge["name"] == "human"


def test_weights_elsewhere_are_a_warning_and_the_launcher_refuses(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    keys = ["policies.a.load", "policies.b.load", "policies.c.load", "models.reward.load"]
    assert [p.key for p in missing_weights(recipe)] == keys and len(recipe.warnings) == 4
    assert not any(
        "hub/name" in warning for warning in small(tmp_path, "policies.a.load=hub/name").warnings
    )


def test_the_architecture_comes_from_the_policies_weights(tmp_path: Path) -> None:
    numbers = (2, 32, 64, 4, 2, 8, 259)
    folders = {name: tmp_path / name for name in ("a", "b", "c", "rm")}
    for name, folder in folders.items():
        folder.mkdir()
        shape = asdict(Architecture(*numbers, 2048 if name != "c" else 1024))
        roles = {"reward" if name == "rm" else "actor": {"architecture": shape}}
        (folder / "meta.json").write_text(json.dumps({"format": "gipo_megatron", "roles": roles}))
    text = SMALL.replace("model/tiny, ", "")
    words = [
        f"policies.{name}.load={folder}" for name, folder in folders.items() if name != "rm"
    ] + [f"models.reward.load={folders['rm']}"]
    (problem,) = problems(tmp_path, *words, text=text)
    assert (
        problem.key == "policies.c.load"
        and "another architecture than policies.a.load's: max_positions 1024 ≠ 2048" in problem.what
    )
    recipe = small(tmp_path, *words, f"policies.c.load={folders['b']}", text=text)
    assert recipe.model.architecture == Architecture(*numbers, 2048) and recipe.warnings == ()
    assert [p.key for p in problems(tmp_path, text=text)] == ["model.architecture"]


def test_a_recipe_with_policies_is_an_evaluation(tmp_path: Path) -> None:
    own = str(write(tmp_path, mine=SMALL, other="defaults: [tiny/gipo]\n"))
    for name in ("tiny/evaluate", "hh_evaluate", "base/evaluate", own):
        assert is_evaluation([f"recipe={name}"], RECIPES)
    for name in ("tiny/gipo", str(tmp_path / "other.yaml")):
        assert not is_evaluation([f"recipe={name}"], RECIPES)
