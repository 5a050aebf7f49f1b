"""Keys, which no file and no screen shows, and texts that try to be more than text."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Mapping
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.injections import ALL, SCRIPT
from tools.faults import runs, servers
from tools.faults.commands import QUESTIONS, SECRETS, command, evaluation, judged, one_screen, sft
from tools.faults.trial import Bench, Trial, expect

KEYS, TEXTS = "keys", "injected texts"
SMALL = ("from the environment",)
SURVIVED = {
    KEYS: "no key in any file or output, not in base64 either; one in a recipe is refused",
    TEXTS: "of 55: no script or element of a page, no escape on a terminal, no control token, no"
    " end of a judge's block; the judge's form alone gives the verdict",
}


def trials() -> list[Trial]:
    recipes = [
        Trial(KEYS, name, partial(_key_in_a_recipe, words=words), small=name in SMALL)
        for name, words in IN_RECIPES.items()
    ]
    return [
        Trial(KEYS, "an evaluation", _keys_of_an_evaluation),
        Trial(KEYS, "a run", _keys_of_a_run),
        *recipes,
        Trial(TEXTS, "an evaluation", _texts),
        Trial(TEXTS, "a run", _texts_of_a_run),
        Trial(TEXTS, "a judge that follows them", _obedient, small=True),
    ]


# -------------------------------------------------------------------------------------------- keys


def _no_key(folder: Path, *outputs: str) -> None:
    """Raise Lost where a secret stands in an output or in a file of `folder`."""
    found = [("the output", text.encode()) for text in outputs]
    found += [
        (str(p.relative_to(folder)), p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    ]
    for (place, content), (name, value) in itertools.product(found, SECRETS.items()):
        forms = {value, json.dumps(value)[1:-1], base64.b64encode(value.encode()).decode()[:-4]}
        shown = any(form.encode() in content for form in forms)
        expect(not shown, f"{place} shows {name}")


def _keys_of_an_evaluation(bench: Bench) -> None:
    """The judge repeats the key in its answer, and in an error."""
    with servers.serving(servers.judge) as server:
        good = judged(bench, server.url)
    one_screen(good, 0)

    def refuse(method: str, route: str, body: bytes, headers: Mapping[str, str]) -> Any:
        error = {"message": f"Incorrect key provided: {headers['authorization']}"}
        return 401, json.dumps({"error": error}).encode()

    with servers.serving(refuse) as server:
        bad = judged(bench, server.url, "judge.temperature=1", "run.dir=other")
    one_screen(bad, 2)
    expect("Incorrect key" in bad.stderr, bad.tail())
    _no_key(bench.folder, good.stdout, good.stderr, bad.stdout, bad.stderr)


def _keys_of_a_run(bench: Bench) -> None:
    done = sft(bench.folder, "run.loggers=[console, tensorboard, wandb]")
    one_screen(done, 0)
    _no_key(bench.folder, done.stdout, done.stderr)


IN_RECIPES = {
    "in the address of a judge": ("judge.base_url=http://me:hunter2hunter2@127.0.0.1:9/v1",),
    "in the address of a sampler": (
        'algorithm.rollout={"name": "vllm", "url": "http://me:hunter2hunter2@127.0.0.1:9"}',
    ),
    "in an option of a sampler": (
        'algorithm.rollout={"name": "vllm", "serve": {"args": ["--api-key", "hunter2hunter2"]}}',
    ),
    "from the environment": ("data.path=${oc.env:OPENAI_API_KEY}",),
    "on the command line": (f"data.path={SECRETS['HF_TOKEN']}",),
    "in a wrong place": (f"run.steps={SECRETS['WANDB_API_KEY']}x",),
    "in the address of data": ("data.path=https://me:hunter2hunter2@host.invalid/rows.jsonl",),
}


def _key_in_a_recipe(bench: Bench, words: tuple[str, ...]) -> None:
    if words[0].startswith("judge"):
        recipe = evaluation(bench.folder, bench.base, QUESTIONS)
        done = command(bench.folder, *recipe, *words)
    else:
        train = runs.ppo("gipo", Path("run"), bench.base)
        done = command(bench.folder, "train", *train, *words)
    one_screen(done, 2)
    expect(words[0].split("=")[0].split(".")[0] in done.stderr, f"no key is named: {done.stderr}")
    expect("hunter2" not in done.stderr, f"it is shown: {done.stderr}")
    expect(not (bench.folder / "run").exists(), "it made run.dir")
    _no_key(bench.folder, done.stdout, done.stderr)


# ------------------------------------------------------------------------------------------- texts


def _texts(bench: Bench) -> None:
    """Prompts and their sources, the judge's explanations and an error: the pages, tables and
    output show each as text."""
    texts = {f"{name} {text}"[:200]: text or "x" for name, text in ALL.items()}
    said = itertools.cycle(ALL.values())

    def answer(method: str, route: str, body: bytes, headers: Mapping[str, str]) -> Any:
        form = {"explanation": next(said), "verdict": "B"}
        choice = {"message": {"content": json.dumps(form)}, "finish_reason": "stop"}
        return 200, json.dumps({"choices": [choice]}).encode()

    words = evaluation(bench.folder, bench.base, texts)
    with servers.serving(answer) as server:
        done = command(bench.folder, *words, f"judge.base_url={server.url}/v1")
    one_screen(done, 0)
    _pages_are_text(bench.folder)
    verdicts = (
        (bench.folder / "run" / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    )
    choices = {json.loads(line)["choice"] for line in verdicts}
    expect(len(choices) <= 2 and "first" not in choices, f"verdicts {choices}, not second alone")


class _Page(HTMLParser):
    """Raises Lost for an element or an attribute that only an injected text could bring in."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        scripts = [name for name, _ in attrs if name.startswith("on") or name == "srcdoc"]
        links = [v or "" for name, v in attrs if name in ("src", "href", "action", "content")]
        bad = [v for v in links if re.match(r"javascript:|.*injected\.invalid", v.strip())]
        expect(tag not in ("iframe", "base", "form"), f"an element <{tag}>")
        expect(not scripts and not bad, f"<{tag}> with {scripts or bad}")

    def handle_data(self, data: str) -> None:
        script = self.lasttag == "script" and SCRIPT in data
        expect(not script, f"a script: {data[:80]}")


def _pages_are_text(folder: Path) -> None:
    pages = sorted(folder.rglob("*.html"))
    expect(bool(pages), "no page")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        _Page().feed(text)
        expect("\x1b" not in text and "\x9b" not in text, f"{page.name} has an escape")


def _texts_of_a_run(bench: Bench) -> None:
    """Rows of chats, in the template and on TensorBoard."""
    rows = [
        json.dumps({"messages": [{"role": r, "content": text} for r in ("user", "assistant")]})
        + "\n"
        for text in ALL.values()
    ]
    (bench.folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    data = ("data.format=sft", "data.path=rows.jsonl", "data.template=chatml")
    room = ("data.max_length=768", "data.max_response=300", "model.architecture.max_positions=768")
    done = sft(bench.folder, *data, *room, "run.loggers=[console, tensorboard]")
    one_screen(done, 0)
    _pages_are_text(bench.folder)


def _obedient(bench: Bench) -> None:
    """A judge that repeats what it read, and gives no verdict in its form, has no verdict; one
    that quotes it and then gives its verdict has that."""
    from gipo_megatron.evaluation.judges.answers import read_answer
    from gipo_megatron.evaluation.types import SECOND

    for name, text in ALL.items():
        form = {"explanation": f"Answer A is: {text}", "verdict": "B"}
        for ascii_only in (True, False):
            said = json.dumps(form, ensure_ascii=ascii_only)
            message = {"message": {"content": said}, "finish_reason": "stop"}
            choice = read_answer({"choices": [message]}).choice
            expect(choice == SECOND, f"{name}: {choice}")
