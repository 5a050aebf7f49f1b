"""Paths in recipes and on the command line: `~`, and characters that shells and YAML read."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gipo_megatron import registry
from gipo_megatron.commands import RECIPES
from gipo_megatron.commands.plot import parse
from gipo_megatron.commands.words import arguments
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.recipe import EvaluationRecipe, compose_evaluation
from gipo_megatron.files import expand
from gipo_megatron.recipe.compose import compose
from gipo_megatron.recipe.files import parse_arguments
from gipo_megatron.recipe.problems import RecipeErrors
from gipo_megatron.recipe.schema import Recipe
from gipo_megatron.recipe.source import COMMAND_LINE, parse_value
from gipo_megatron.specs import Place
from tests.recipe.helpers import small

# a key of these names holds a path in every section
NAMES = {"dir", "load", "path", "hub", "tokenizer", "resume", "data_root", "ratings", "cache"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_expand_is_the_shells_rule(home: Path) -> None:
    assert expand("~") == str(home) and expand("~/a b/c") == f"{home}/a b/c"
    assert expand("~root/x").startswith("/") and expand("~root/x").endswith("/x")
    for same in ("a/~", "./~x", "/x/~/y", "runs/a", "random", "owner/name", ""):
        assert expand(same) == same
    with pytest.raises(UserError, match="no such home folder"):
        expand("~no-such-user/x")
    with pytest.raises(UserError, match="no file name"):
        expand("a\0b")


def test_expand_refuses_what_the_file_system_cannot_name(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsencode", lambda path: path.encode("ascii"))
    assert expand("~/a") == f"{home}/a"
    with pytest.raises(UserError) as error:
        expand("ä")
    assert "PYTHONUTF8=1" in error.value.fix


def keys(cls: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of each field of the dataclasses below `cls`."""
    for f in dataclasses.fields(cls):
        hint = registry.hints(cls)[f.name]
        parts = [hint, *getattr(hint, "__args__", ())]
        nested = [part for part in parts if dataclasses.is_dataclass(part)]
        for part in nested:
            yield from keys(part, f"{path}{f.name}.")
        if not nested:
            yield path + f.name, hint


def test_every_key_with_a_paths_name_is_typed_as_a_path() -> None:
    found = {key: hint for cls in (Recipe, EvaluationRecipe) for key, hint in keys(cls)}
    paths = {key: str(hint) for key, hint in found.items() if key.split(".")[-1] in NAMES}
    assert len(paths) >= 8
    assert not [key for key, hint in paths.items() if repr(Place()) not in hint]


def test_recipes_expand_every_path(home: Path) -> None:
    words = ["run.dir=~/a", "models.actor.load=random", "model.tokenizer=bytes"]
    recipe = small(home, *words, "run.resume=~/b", "data.path=", "model.hub=~/hub")
    assert (recipe.run.dir, recipe.run.resume) == (f"{home}/a", f"{home}/b")
    assert recipe.model.hub == f"{home}/hub"
    found = compose_evaluation(
        ["recipe=tiny/evaluate", "data_root=~/d", "run.dir=~/e", "policies.ppo.load=${run.dir}/p"],
        RECIPES,
    )
    assert (found.data_root, found.run.dir) == (f"{home}/d", f"{home}/e")
    assert found.policies["ppo"].load == f"{home}/e/p"
    judge = ["judge.name=human", "judge.ratings=[~/1.json, 2.json]"]
    asked = compose_evaluation(["recipe=tiny/evaluate", *judge], RECIPES).judge
    assert asked["ratings"] == [f"{home}/1.json", "2.json"]


def test_recipe_files_below_home(home: Path) -> None:
    (home / "mine.yaml").write_text("defaults: [tiny/sft, ~/base]\n", encoding="utf-8")
    (home / "base.yaml").write_text("run: {seed: 7}\n", encoding="utf-8")
    assert compose(["recipe=~/mine.yaml"], RECIPES).run.seed == 7
    assert compose(["recipe=tiny/sft", "with=~/base"], RECIPES).run.seed == 7


def test_tools_expand_their_words(home: Path) -> None:
    found = arguments(["hf=~/m", "out=~/o"], required=("hf", "out"), optional={})
    assert found == {"hf": f"{home}/m", "out": f"{home}/o"}
    assert parse(["~/r", "out=~/o", "report=~/p"]) == ([f"{home}/r"], f"{home}/o", f"{home}/p")


def test_an_unknown_home_names_its_key(home: Path) -> None:
    with pytest.raises(RecipeErrors) as error:
        small(home, "run.dir=~no-such-user/x")
    assert "run.dir: '~no-such-user/x': there is no such home folder" in str(error.value)
    assert not [path for path in home.iterdir() if path.name.startswith("~")]


LITERAL = [
    "/a b/c=d",
    "-x",
    "é/ü",
    "$HOME/x",
    "it's",
    "a,b",
    "a[0]",
    "😀",
    "a=b=c",
    "x:y",
    "a#b",
    "a\tb",
]
REFUSED = ["/a #b", "[x", "*a", "@a", '"q" r', "!x y", "& a", "a\nb", "- [", "{a", "`a`"]


@pytest.mark.parametrize("text", LITERAL)
def test_text_on_the_command_line_is_kept(text: str) -> None:
    assert parse_arguments(["recipe=r", f"run.dir={text}"]).overrides.value("run.dir") == text


@pytest.mark.parametrize("text", REFUSED)
def test_text_that_yaml_would_change_is_refused_and_the_advice_works(text: str) -> None:
    with pytest.raises(RecipeErrors) as error:
        parse_arguments(["recipe=r", f"run.dir={text}"])
    (problem,) = error.value.problems
    assert problem.key == "run.dir" and problem.where == COMMAND_LINE
    (word,) = shlex.split(problem.fix.split("YAML: ")[1])
    assert parse_arguments(["recipe=r", word]).overrides.value("run.dir") == text


@pytest.mark.parametrize("text", ["2024", "[x]", "a: b", "- x", "null", "true", "{a}", "1e3"])
def test_text_that_yaml_reads_as_something_else_is_refused_with_the_quotes(
    text: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeErrors) as error:
        small(tmp_path, f"run.dir={text}")
    (problem,) = error.value.problems
    assert problem.key == "run.dir" and problem.fix.endswith("""'run.dir="…"'"""), problem


def test_bytes_that_are_no_text_are_refused_with_the_variable() -> None:
    """As `é` arrives with LC_ALL=C and PYTHONUTF8=0."""
    with pytest.raises(UserError, match="not in the locale's encoding") as error:
        parse_value("/a/\udcc3\udca9", ("run", "dir"), COMMAND_LINE)
    assert "PYTHONUTF8=1" in error.value.fix


def test_a_comment_is_no_part_of_a_number() -> None:
    with pytest.raises(UserError, match="YAML reads"):
        parse_value("5 # five", ("run", "steps"), COMMAND_LINE)
