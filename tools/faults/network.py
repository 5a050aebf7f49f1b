"""Servers that misbehave under the judge and the sampler, W&B without a network, keys, and texts
that try to be more than text."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.injections import ALL, SCRIPT
from tools.faults import runs, servers, world
from tools.faults.trial import Bench, Trial, expect
from tools.faults.world import GIPO, ROOT, Finished

JUDGE, SAMPLER = "judge's server: a fault", "rollout server: a fault"
WANDB, KEYS, TEXTS = "W&B without a network", "keys", "injected texts"
SURVIVED = {
    JUDGE: "once: all verdicts, or exit 2; always: exit 2, one screen; then the same command on a"
    " sound server gives the results of an evaluation without a fault",
    SAMPLER: "once or always: the run saves and ends with exit 2 and one screen; the same command"
    " on a sound server continues, to the same bits",
    WANDB: "the run ends well, its metrics as without W&B; at most one warning",
    KEYS: "no key in any file or output, not in base64 either; one in a recipe is refused",
    TEXTS: "of 55: no script or element of a page, no escape on a terminal, no control token, no"
    " end of a judge's block; the judge's form alone gives the verdict",
}
FAKE = ROOT / "tests" / "serving" / "fake.py"
GENERATE = "/inference/v1/generate"
SECRETS = {
    "OPENAI_API_KEY": "sk-campaign/never+shown-0123456789",
    "VLLM_API_KEY": "vllm-campaign-never-shown-0123",
    "HF_TOKEN": "hf_CampaignNeverShown0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}
SCREEN = 40  # lines
# tests/test_http_client.py tries all faults on both clients
OF_SAMPLERS = (
    *("dies", "stalls", "trickles", "floods", "declares a shorter body", "answers HTML"),
    *("redirects to another host", "gzip bomb"),
)
# of these a client can make no answer: the others give the faults that it retries
ENDS = ("dies", "redirects to another host")


def trials() -> list[Trial]:
    small = ("floods", "redirects to another host")
    return [
        *(Trial(JUDGE, n, partial(_judge, name=n), small=n in small) for n in servers.FAULTS),
        *(Trial(SAMPLER, n, partial(_sampler, name=n)) for n in OF_SAMPLERS),
        *(Trial(WANDB, n, partial(_wandb, name=n)) for n in ("refuses", "stalls", "answers HTML")),
        Trial(KEYS, "an evaluation", _keys_of_an_evaluation),
        Trial(KEYS, "a run", _keys_of_a_run),
        *(Trial(KEYS, n, partial(_key_in_a_recipe, words=w)) for n, w in IN_RECIPES.items()),
        Trial(TEXTS, "an evaluation", _texts),
        Trial(TEXTS, "a run", _texts_of_a_run),
        Trial(TEXTS, "a judge that follows them", _obedient),
    ]


def _one_screen(done: Finished, code: int) -> None:
    text = done.stdout + done.stderr
    expect(done.code == code, f"not exit {code}: {done.tail()}")
    expect("Traceback" not in text, f"a traceback: {done.tail()}")
    expect(len(done.stderr.splitlines()) <= SCREEN, f"more than a screen: {done.tail()}")
    expect(not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), f"escapes: {done.tail()}")


# --------------------------------------------------------------------------------------- a judge


def _policies(base: Path) -> Path:
    """Make the policies `sft` and `noisy`, which answer otherwise; return their folder."""
    runs.trained(base)
    noisy = base / "noisy"
    if not noisy.exists():
        import torch
        from safetensors.torch import load_file, save_file

        made = Path(shutil.copytree(base / "sft" / "hf", base / ".noisy", dirs_exist_ok=True))
        noise = torch.Generator().manual_seed(0)
        tensors = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=noise)
            for name, tensor in load_file(made / "model.safetensors").items()
        }
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        made.rename(noisy)
    return base


def _evaluation(folder: Path, base: Path, prompts: Mapping[str, str]) -> tuple[str, ...]:
    """Write the recipe; return the words of the command."""
    rows = [json.dumps({"prompt": text, "source": name}) + "\n" for name, text in prompts.items()]
    (folder / "prompts.jsonl").write_text("".join(rows))
    task = {"name": "short", "kind": "helpful", "data": "prompts.jsonl", "template": "hh"}
    recipe = {
        "defaults": ["base/evaluate", "hardware/cpu"],
        "model": {"tokenizer": "bytes"},
        "policies": {n: {"load": f"{base}/{p}"} for n, p in (("a", "noisy"), ("b", "sft/final"))},
        "tasks": [{**task, "prompts": 99, "max_length": 512}],
        "data_root": str(folder),
        "generation": {"max_response": 8, "temperature": 0},
        "judge": {"name": "openai", "model": "m", "concurrency": 2, "backoff": 0.05},
        "report": {"bootstrap": 50},
    }
    (folder / "evaluate.yaml").write_text(json.dumps(recipe))
    words = ("judge.timeout=1.5", "judge.retries=2", "run.dir=run")
    return ("evaluate", f"recipe={folder / 'evaluate.yaml'}", *words)


QUESTIONS = {f"q{i}": f"Say {'very ' * (i % 4)}number {i}." for i in range(6)}


def _judged(bench: Bench, url: str, *more: str) -> Finished:
    """Run the evaluation of QUESTIONS, whose responses are there, in the trial's folder."""
    words = _evaluation(bench.folder, _policies(bench.base), QUESTIONS)
    return _command(bench.folder, *words, f"judge.base_url={url}/v1", *more)


def _command(folder: Path, *words: str, **more: Any) -> Finished:
    return world.run(GIPO, *words, folder=folder, env=SECRETS, timeout=200, **more)


def _reference(bench: Bench) -> Path:
    """Make BASE/judged/run, an evaluation without a fault; return BASE/judged."""
    home = bench.base / "judged"
    if not (home / "run" / "results.json").exists():
        home.mkdir(exist_ok=True)
        with servers.serving(servers.judge) as server:
            _one_screen(_judged(Bench(home, bench.base, bench.random), server.url), 0)
    return home


def _results(folder: Path) -> Any:
    results = json.loads((folder / "run" / "results.json").read_text())
    return {name: value for name, value in results.items() if name != "judge"}


def _judge(bench: Bench, name: str) -> None:
    done = _reference(bench)
    for folder in ("origin.json", "prompts.jsonl", "responses"):
        source, target = done / "run" / folder, bench.folder / "run" / folder
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    fault = {"fault": servers.FAULTS[name], "route": "/v1"}
    with servers.serving(servers.judge) as other:
        with servers.serving(servers.judge, **fault, other=other.url) as server:
            _one_screen(_judged(bench, server.url), 2)
        with servers.serving(servers.judge, **fault, after=2, times=1, other=other.url) as server:
            _one_screen(_judged(bench, server.url), 2 if name in ENDS else 0)
        expect(not other.requests, f"a request to another host: {other.requests}")
        _one_screen(_judged(bench, other.url), 0)
    expect(_results(bench.folder) == _results(done), "other results than without a fault")
    left = [p.name for p in bench.folder.rglob("*") if p.suffix in (".partial", ".tmp")]
    expect(not left, f"half-written: {left}")


# -------------------------------------------------------------------------------- a rollout server


def _forward(url: str) -> servers.Answer:
    """Return an answer that the server at `url` gives."""

    def answer(method: str, route: str, body: bytes, headers: Mapping[str, str]) -> Any:
        kept = {k: v for k, v in headers.items() if k in ("content-type", "authorization")}
        request = urllib.request.Request(url + route, body or None, kept, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    return answer


@contextmanager
def _sampling(base: Path, **fault: Any) -> Any:
    """Serve the base model's responses; yield the server in front of it."""
    from gipo_megatron.serving.client import Client
    from gipo_megatron.serving.process import free_port

    port = free_port()
    words = ("--model", str(base / "sft" / "hf"), "--port", str(port))
    with ExitStack() as opened:
        behind = opened.enter_context(world.world(FAKE, *words))
        url = f"http://127.0.0.1:{port}"
        expect(behind.until(Client(url, 5).healthy), "the fake server does not start")
        yield opened.enter_context(servers.serving(_forward(url), **fault))


def _train(folder: Path, base: Path, url: str) -> Finished:
    rollout = {"name": "vllm", "url": url, "timeout": 8}
    words = runs.ppo("gipo", Path("run"), base, f"algorithm.rollout={json.dumps(rollout)}")
    return _command(folder, "train", *words, "run.steps=2", "evaluation.temperature=0")


def _sampler(bench: Bench, name: str) -> None:
    base = runs.trained(bench.base)
    home = bench.base / "sampled"
    if not (home / "run" / "final").exists():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        with _sampling(base) as server:
            _one_screen(_train(home, base, server.url), 0)
    # the evaluation before the run has 16 responses, an iteration too
    fault = {"fault": servers.FAULTS[name], "route": GENERATE, "after": 40}
    with servers.serving(servers.judge) as other:
        with _sampling(base, **fault, other=other.url) as server:
            _one_screen(_train(bench.folder, base, server.url), 2)
        expect(not other.requests, f"a request to another host: {other.requests}")
    expect(runs.logged(bench.folder / "run", 1), "the first iteration is not kept")
    with _sampling(base) as server:
        _one_screen(_train(bench.folder, base, server.url), 0)
    different = runs.difference(bench.folder / "run", home / "run")
    expect(not different, different)


# --------------------------------------------------------------------------------------------- W&B


def _sft(folder: Path, *words: str, **more: Any) -> Finished:
    return _command(folder, "train", *runs.sft(Path("run"), "run.eval_every=2", *words), **more)


def _plain(bench: Bench) -> Path:
    """Make BASE/plain/run, a run without W&B; return it."""
    home = bench.base / "plain"
    if not (home / "run" / "final").exists():
        home.mkdir(exist_ok=True)
        _one_screen(_sft(home), 0)
    return home / "run"


def _online(rank: int, url: str) -> None:
    """Set W&B's variables as on a machine with a login; the campaign's own are for offline runs."""
    del os.environ["WANDB_MODE"]
    os.environ |= {"WANDB_BASE_URL": url, "WANDB_FINISH_TIMEOUT": "5"}


def _wandb(bench: Bench, name: str) -> None:
    """A server that is not there, never answers, or is a login page; W&B gives up after 30 s."""
    fault = {"refuses": servers.dies, "stalls": servers.stalls, "answers HTML": servers.is_html}
    with servers.serving(servers.judge, fault=fault[name]) as server:
        if name == "refuses":
            server.stop()
        done = _sft(bench.folder, "run.loggers=[wandb]", before=partial(_online, url=server.url))
    _one_screen(done, 0)
    expect(len(done.stderr.splitlines()) <= 1, f"more than one warning: {done.stderr}")
    different = runs.difference(bench.folder / "run", _plain(bench))
    expect(not different, different)


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
        good = _judged(bench, server.url)
    _one_screen(good, 0)

    def refuse(method: str, route: str, body: bytes, headers: Mapping[str, str]) -> Any:
        error = {"message": f"Incorrect key provided: {headers['authorization']}"}
        return 401, json.dumps({"error": error}).encode()

    with servers.serving(refuse) as server:
        bad = _judged(bench, server.url, "judge.temperature=1", "run.dir=other")
    _one_screen(bad, 2)
    expect("Incorrect key" in bad.stderr, bad.tail())
    _no_key(bench.folder, good.stdout, good.stderr, bad.stdout, bad.stderr)


def _keys_of_a_run(bench: Bench) -> None:
    done = _sft(bench.folder, "run.loggers=[console, tensorboard, wandb]")
    _one_screen(done, 0)
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
        recipe = _evaluation(bench.folder, _policies(bench.base), QUESTIONS)
        done = _command(bench.folder, *recipe, *words)
    else:
        train = runs.ppo("gipo", Path("run"), runs.trained(bench.base))
        done = _command(bench.folder, "train", *train, *words)
    _one_screen(done, 2)
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

    words = _evaluation(bench.folder, _policies(bench.base), texts)
    with servers.serving(answer) as server:
        done = _command(bench.folder, *words, f"judge.base_url={server.url}/v1")
    _one_screen(done, 0)
    _pages_are_text(bench.folder)
    verdicts = (bench.folder / "run" / "verdicts.jsonl").read_text().splitlines()[1:]
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
        text = page.read_text()
        _Page().feed(text)
        expect("\x1b" not in text and "\x9b" not in text, f"{page.name} has an escape")


def _texts_of_a_run(bench: Bench) -> None:
    """Rows of chats, in the template and on TensorBoard."""
    rows = [
        json.dumps({"messages": [{"role": r, "content": text} for r in ("user", "assistant")]})
        + "\n"
        for text in ALL.values()
    ]
    (bench.folder / "rows.jsonl").write_text("".join(rows))
    data = ("data.format=sft", "data.path=rows.jsonl", "data.template=chatml")
    room = ("data.max_length=768", "data.max_response=300", "model.architecture.max_positions=768")
    done = _sft(bench.folder, *data, *room, "run.loggers=[console, tensorboard]")
    _one_screen(done, 0)
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
