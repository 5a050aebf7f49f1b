"""Faults of servers: a judge's, a sampler's, and W&B without a network."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tools.faults import runs, servers, systems, world
from tools.faults.commands import SECRETS, command, judged, one_screen, sft
from tools.faults.trial import Bench, Trial, expect
from tools.faults.world import GIPO, ROOT, Finished

JUDGE, SAMPLER = "judge's server: a fault", "rollout server: a fault"
WANDB = "W&B without a network"
SURVIVED = {
    JUDGE: "once: all verdicts, or exit 2; always: exit 2, one screen; then the same command on a"
    " sound server gives the results of an evaluation without a fault",
    SAMPLER: "once or always: the run saves and ends with exit 2 and one screen; the same command"
    " on a sound server continues, to the same bits",
    WANDB: "the run ends well, its metrics as without W&B; at most one warning",
}
FAKE = ROOT / "tests" / "serving" / "fake.py"
GENERATE = "/inference/v1/generate"
OF_WANDB = ("refuses", "stalls", "answers HTML")
# tests/test_http_client.py tries all faults on both clients
OF_SAMPLERS = (
    *("dies", "stalls", "trickles", "floods", "declares a shorter body", "answers HTML"),
    *("redirects to another host", "gzip bomb"),
)
# of these a client can make no answer: the others give the faults that it retries
ENDS = ("dies", "redirects to another host")


def trials() -> list[Trial]:
    return [
        *(Trial(JUDGE, n, partial(_judge, name=n)) for n in servers.FAULTS),
        *(Trial(SAMPLER, n, partial(_sampler, name=n)) for n in OF_SAMPLERS),
        *(Trial(WANDB, n, partial(_without_wandb, name=n)) for n in OF_WANDB),
        Trial(WANDB, "refuses after a step", partial(_wandb_is_lost, killed=False)),
        Trial(WANDB, "its process is killed", partial(_wandb_is_lost, killed=True)),
    ]


# --------------------------------------------------------------------------------------- a judge


def _reference(bench: Bench) -> Path:
    """Make BASE/judged/run, an evaluation without a fault; return BASE/judged."""
    home = bench.base / "judged"
    if not (home / "run" / "results.json").exists():
        home.mkdir(exist_ok=True)
        with servers.serving(servers.judge) as server:
            one_screen(judged(Bench(home, bench.base, bench.random), server.url), 0)
    return home


def _results(folder: Path) -> Any:
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
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
            one_screen(judged(bench, server.url), 2)
        with servers.serving(servers.judge, **fault, after=2, times=1, other=other.url) as server:
            one_screen(judged(bench, server.url), 2 if name in ENDS else 0)
        expect(not other.requests, f"a request to another host: {other.requests}")
        one_screen(judged(bench, other.url), 0)
    expect(_results(bench.folder) == _results(done), "other results than without a fault")
    left = systems.leftovers(bench.folder / "run")
    expect(not left, left)


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
    return command(folder, "train", *words, "run.steps=2", "evaluation.temperature=0")


def _sampler(bench: Bench, name: str) -> None:
    base = runs.trained(bench.base)
    home = bench.base / "sampled"
    if not (home / "run" / "final").exists():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        with _sampling(base) as server:
            one_screen(_train(home, base, server.url), 0)
    # the evaluation before the run has 16 responses, an iteration too
    fault = {"fault": servers.FAULTS[name], "route": GENERATE, "after": 40}
    with servers.serving(servers.judge) as other:
        with _sampling(base, **fault, other=other.url) as server:
            one_screen(_train(bench.folder, base, server.url), 2)
        expect(not other.requests, f"a request to another host: {other.requests}")
    expect(runs.logged(bench.folder / "run", 1), "the first iteration is not kept")
    with _sampling(base) as server:
        one_screen(_train(bench.folder, base, server.url), 0)
    different = runs.difference(bench.folder / "run", home / "run")
    expect(not different, different)


# --------------------------------------------------------------------------------------------- W&B


def _plain(bench: Bench) -> Path:
    """Make BASE/plain/run, a run without W&B; return it."""
    home = bench.base / "plain"
    if not (home / "run" / "final").exists():
        home.mkdir(exist_ok=True)
        one_screen(sft(home), 0)
    return home / "run"


def _online(rank: int, url: str) -> None:
    """Set W&B's variables as on a machine with a login; the campaign's own are for offline runs."""
    del os.environ["WANDB_MODE"]
    os.environ |= {"WANDB_BASE_URL": url, "WANDB_FINISH_TIMEOUT": "5"}


def _without_wandb(bench: Bench, name: str) -> None:
    """A server that is not there, never answers, or is a login page; W&B gives up after 30 s."""
    fault = {"refuses": servers.dies, "stalls": servers.stalls, "answers HTML": servers.is_html}
    with servers.serving(servers.wandb, fault=fault[name]) as server:
        if name == "refuses":
            server.stop()
        online = partial(_online, url=server.url)
        _as_without(bench, sft(bench.folder, "run.loggers=[wandb]", before=online))


def _wandb_is_lost(bench: Bench, killed: bool) -> None:
    """After the first step the server goes, or W&B's process is killed."""
    words = runs.sft(Path("run"), "run.eval_every=2", "run.loggers=[wandb]")
    with servers.serving(servers.wandb) as server:
        online = partial(_online, url=server.url)
        start = world.world(GIPO, "train", *words, folder=bench.folder, env=SECRETS, before=online)
        with start as run:
            expect(run.until(lambda: runs.logged(bench.folder / "run", 1)), "no step")
            expect(bool(server.requests), "W&B has sent nothing")
            if killed:
                inside = psutil.Process(run.processes[0].pid).children(recursive=True)
                core = [process for process in inside if "wandb" in process.name()]
                expect(bool(core), f"no process of W&B: {inside}")
                for process in core:
                    process.kill()
            else:
                server.stop()
            _as_without(bench, run.wait(120))


def _as_without(bench: Bench, done: Finished) -> None:
    one_screen(done, 0)
    expect(len(done.stderr.splitlines()) <= 1, f"more than one warning: {done.stderr}")
    different = runs.difference(bench.folder / "run", _plain(bench))
    expect(not different, different)
