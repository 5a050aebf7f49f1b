"""Inputs that ended with a traceback or a hang before: shrunk, and what is printed now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.fuzzing import folders, judges, recipes
from tools.fuzzing.case import Case, Screen, run
from tools.fuzzing.values import as_json, nested

pytestmark = pytest.mark.global_rng

SMALL = "defaults: [tiny/sft]\n"
CHECK = ("recipe", "check", recipes.FILE)
PLAN = ("plan", f"recipe={recipes.FILE}")


def recipe(text: str, *words: str, command: tuple[str, ...] = CHECK) -> Case:
    return Case((*command, *words), {recipes.FILE: (SMALL + text).encode()})


def includes(name: str) -> Case:
    text = f"defaults: [{json.dumps(name)}]\n"
    return Case(CHECK, {recipes.FILE: text.encode()}, ("fuzz.yaml:1",))


LARGE = "9" * 5000
LAYERS = "model: {architecture: {num_layers: 2000000000}}\n"
DOUBLED = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
RECIPES: dict[str, tuple[Case, str]] = {
    "a tag": (recipe("run: {steps: !!int abc}\n"), "fuzz.yaml:2"),
    "an alias": (recipe("run: &a {steps: *a}\n"), "an alias, *a"),
    "many aliases": (recipe("a0: &a0 [x]\n" + DOUBLED), "an alias, *a0"),
    "a deep list": (recipe(f"run: {'[' * 400}{']' * 400}\n"), "more than 32 blocks"),
    "a deeper one": (recipe(f"run: {'[' * 90_000}\n"), "fuzz.yaml"),
    "a long number": (recipe(f"run: {{steps: {LARGE}}}\n"), "run.steps: needs a whole number"),
    "a large number": (recipe("run: {steps: 10000000000000000000}\n"), "is too large"),
    "a seed": (recipe("run: {seed: 99999999999999999999}\n"), "run.seed: "),
    "no finite number": (recipe("models: {actor: {lr: 1e999}}\n"), "inf is not finite"),
    "a long text": (recipe(f"run: {{steps: {'x' * 50_000}}}\n"), "run.steps: needs a whole number"),
    "rows": (recipe("batch: {minibatch: 7, micro_batch: 1000000000000}\n"), "batch.minibatch"),
    "layers": (recipe(LAYERS, command=PLAN), "num_layers: "),
    "the name .": (includes("."), "there is no recipe '.'"),
    "no name": (includes(""), "there is no recipe ''"),
    "the name /": (includes("/"), "there is no recipe '/'"),
    "a long name": (includes("x" * 300), "longer than a file's name"),
    "a long path": (recipe(f"models: {{actor: {{load: {'x' * 300}}}}}\n"), "models.actor.load"),
    "a square": (recipe("", "world=\u00b2"), "world: needs a number of processes"),
    "a long world": (recipe("", f"world={LARGE}"), "world: needs a number of processes"),
    "a word": (recipe("", f"run.steps={'[' * 500}"), "run.steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path) -> None:
    case, said = RECIPES[name]
    screen = run(case, tmp_path / "here")
    assert screen.code == 2 and said in screen.err, screen.err


# --------------------------------------------------------------------------------------- folders


def changed(files: dict[str, bytes], name: str, change: Callable[[Any], Any]) -> dict[str, bytes]:
    """Return the files with another value in one; a checkpoint's meta.json has the new size."""
    found = {**files, name: as_json(change(json.loads(files[name])))}
    meta = "checkpoint/meta.json"
    if meta in found and name != meta:
        about = json.loads(found[meta])
        about["files"][name.removeprefix("checkpoint/")] = len(found[name])
        about["digests"] = None
        found[meta] = as_json(about)
    return found


def with_role(**values: Any) -> Callable[[Any], Any]:
    """A change of a role's values in meta.json; an architecture's are merged."""

    def change(meta: Any) -> Any:
        role = meta["roles"]["actor"]
        for key, value in values.items():
            inner = isinstance(value, dict) and isinstance(role[key], dict)
            role[key] = {**role[key], **value} if inner else value
        return meta

    return change


TO_HF = ("convert", "to-hf", "checkpoint=checkpoint", "out=out", "verify=false")
META: dict[str, tuple[Callable[[Any], Any], str]] = {
    "version": (lambda meta: {**meta, "version": [2]}, "version: needs a whole number"),
    "deep": (lambda meta: {**meta, "commit": nested(300)}, "commit: needs text"),
    "files": (lambda meta: {**meta, "files": {"state.pt": "9"}}, "files.state.pt: needs a whole"),
    "roles": (lambda meta: {**meta, "roles": [1]}, "roles: needs a block of keys"),
    "layers": (
        with_role(architecture={"num_layers": "2"}),
        "roles.actor.architecture.num_layers: needs a whole number",
    ),
    "many layers": (with_role(architecture={"num_layers": 2**40}), "num_layers: "),
    "rope": (with_role(architecture={"rope_scaling": [1]}), "rope_scaling: needs a block of keys"),
    "dtype": (with_role(dtype={"a": 1}), "roles.actor.dtype: needs text"),
    "another dtype": (with_role(dtype="int4"), "roles.actor.dtype: 'int4' is not one of"),
    "groups": (with_role(num_groups=0), "roles.actor.num_groups: 0 must be at least 1"),
    "a key": (with_role(colour=1), "roles.actor.colour: unknown key"),
    "no role": (lambda meta: {**meta, "roles": {}}, "the checkpoint has no 'actor'"),
    "another width": (with_role(architecture={"hidden_size": 16}), "checkpoint"),
}


@pytest.mark.parametrize("name", META)
def test_meta_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    change, said = META[name]
    files = folders.below("checkpoint", folders.checkpoint("model"))
    screen = run(Case(TO_HF, changed(files, "checkpoint/meta.json", change)), tmp_path / "here")
    assert screen.code == 2 and said in screen.err, screen.err


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", lambda config: {}, "model_type None"),
        ("config.json", lambda config: [], "a JSON list, not an object"),
        ("config.json", lambda config: {**config, "rope_scaling": "x"}, "rope_scaling: 'x'"),
        ("generation_config.json", lambda config: 3, "a JSON int, not an object"),
        ("generation_config.json", lambda config: {"eos_token_id": "x"}, "eos_token_id: 'x'"),
    ],
)
def test_files_of_the_model_that_a_checkpoint_came_from(
    file: str, change: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    files = folders.below("checkpoint", folders.checkpoint("model"))
    files = changed(files, f"checkpoint/huggingface/actor/{file}", change)
    screen = run(Case(TO_HF, files), tmp_path / "here")
    assert screen.code == 2 and said in screen.err and file in screen.err, screen.err


@pytest.mark.parametrize("content", [b"{", None])
def test_adapters_name_their_file(content: bytes | None, tmp_path: Path) -> None:
    """One that is cut, and one whose base is nowhere."""
    files, name = folders.adapted(), "adapters/adapter_config.json"
    lost = {**json.loads(files[name]), "base_model_name_or_path": "0"}
    files[name] = as_json(lost) if content is None else content
    screen = run(
        Case((*folders.CHECK[:-1], "models.actor.load=adapters"), files), tmp_path / "here"
    )
    why = "cannot read" if content is not None else "'0' is no local path"
    assert screen.code == 2 and f"{name}: {why}" in screen.err, screen.err


def test_a_tokenizer_is_used_once_where_it_is_loaded(tmp_path: Path) -> None:
    files = changed(
        folders.below("model", folders.model()),
        "model/tokenizer_config.json",
        lambda config: {**config, "model_max_length": {"x": 1}},
    )
    words = (*folders.PREPARE, "tokenizer=model")
    screen = run(Case(words, {**files, "d.jsonl": folders.ROWS}), tmp_path / "here")
    assert screen.code == 2 and "cannot load a tokenizer from 'model'" in screen.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"headline": [["loss"]]}', "headline: needs a list of text"),
        (b'{"stage": 3}', "stage: needs text"),
        (b"\xff", "UnicodeDecodeError"),
        (b"a: !!int x", "ValueError"),
        (b"[" * 3000, "RecursionError"),
    ],
)
def test_environment_of_a_run(content: bytes, said: str, tmp_path: Path) -> None:
    files = {"run/environment.json": content, "run/metrics.jsonl": b'{"step": 1, "a": 1.0}\n'}
    screen = run(Case(("plot", "run", "out=out"), files), tmp_path / "here")
    assert screen.code == 2 and said in screen.err and "run/environment.json" in screen.err


# ---------------------------------------------------------------------------------------- judges


def read(answer: judges.Answer, folder: Path) -> Screen:
    return judges.run(answer, folder / "here")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key: {k: v for k, v in key.items() if k != "raters"}, "raters: missing"),
        (lambda key: {**key, "raters": 3}, "raters: needs a block of keys"),
        (lambda key: {**key, "pairs": {}}, "pairs lacks"),
        (lambda key: {**key, "seed": "x"}, "seed: needs a whole number"),
    ],
)
def test_key_of_annotation_pages(change: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    files = judges.study()
    name = next(name for name in files if name.endswith("key.json"))
    files[name] = as_json(change(json.loads(files[name])))
    screen = read(judges.Answer(200, {}, b"", files=files, action="ratings"), tmp_path)
    assert screen.code == 2 and said in screen.err and name in screen.err


@pytest.mark.parametrize(
    ("action", "key", "value", "said"),
    [
        ("verdicts", "choice", None, "verdicts.jsonl:2"),
        ("verdicts", "cached", "x", "not a verdict: cached: needs true or false"),
        ("responses", "tokens", "3", "not a response: tokens: needs a whole number"),
        ("responses", "figures", {"score": "x"}, "not a response: figures.score: needs a number"),
        ("cache", "body", [1], "not a reply: body: needs a block of keys"),
        ("cache", "changes", 3, "not a reply: changes: needs a list of text"),
        ("cache", "request", {}, "not a reply"),
    ],
)
def test_kept_answers(action: str, key: str, value: Any, said: str, tmp_path: Path) -> None:
    name, head, row = judges.LINES[action]
    rows = [{"key": head}, {**row, key: value}]
    files = {name: b"".join(as_json(line) + b"\n" for line in rows)}
    screen = read(judges.Answer(200, {}, b"", files=files, action=action), tmp_path)
    assert screen.code == 2 and said in screen.err and f"{name}:2" in screen.err


@pytest.mark.parametrize(
    "text", ['{"a":' * 60_000, '{"a": [' * 30_000 + "[[A]]", "{" * 90_000, '{"' * 90_000]
)
def test_an_answer_of_many_objects_is_read_in_time(text: str, tmp_path: Path) -> None:
    """Each object was read until Python's limit: minutes for one answer."""
    answer = judges.Answer(200, {}, as_json(judges.completion(text)))
    assert read(answer, tmp_path).code == 0
