"""Whole runs and evaluations with `rollout: vllm`, on a fake server (tests/serving/fake.py) whose
tokens are those of the pushed weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gipo_megatron.commands import train
from tests import forked
from tests.forked import ROOT
from tests.runs import chain
from tests.runs.chain import Outcome
from tests.serving.fake import Options, serving

pytestmark = pytest.mark.multiprocess
FAKE = ROOT / "tests" / "serving" / "fake.py"
# one evaluation before the run, one after it: responses 0 … 15; then 16 an iteration; 16
STEPS = 2
GREEDY = ("evaluation.temperature=0",)


def gipo(directory: Path, base: Path, rollout: object, *more: str) -> list[str]:
    words = (f"run.steps={STEPS}", f"algorithm.rollout={json.dumps(rollout)}")
    return chain.ppo("gipo", directory, base, *words, *GREEDY, *more)


def served(*fault: str, **serve: object) -> dict[str, object]:
    """A sampler that starts its server; `fault`: more words of the fake's command."""
    command = [sys.executable, str(FAKE), "--model", "{model}", "--port", "{port}", *fault]
    return {"name": "vllm", "serve": {"command": command, **serve}}


def noisy(base: Path, folder: Path) -> Path:
    """The SFT model with noise that makes its greedy responses depend on the whole prompt."""
    shutil.copytree(base / "sft" / "hf", folder)
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def evaluation(directory: Path, base: Path, folder: Path, rollout: object) -> list[str]:
    """Greedy responses of two policies to nine ragged prompts, in batches of four."""
    texts = [f"Say {'very ' * (i % 4)}number {i}." for i in range(9)]
    rows = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(rows))
    recipe = {
        "defaults": ["base/evaluate", "hardware/cpu"],
        "model": {"tokenizer": "bytes"},
        "policies": {
            "noisy": {"load": str(folder / "noisy")},
            "sft": {"load": f"{base}/sft/final"},
        },
        "models": {"reward": {"load": f"{base}/rm/final"}},
        "tasks": [
            {
                "name": "short",
                "kind": "helpful",
                "data": "prompts.jsonl",
                "template": "hh",
                "prompts": 99,
                "max_length": 96,
            }
        ],
        "data_root": str(folder),
        "generation": {"max_response": 8, "temperature": 0, "batch": 4},
        "judge": "reward_model",
        "report": {"bootstrap": 50},
    }
    file = folder / "small_evaluate.yaml"
    file.write_text(json.dumps(recipe))
    return [f"recipe={file}", f"run.dir={directory}", f"rollout={json.dumps(rollout)}"]


@dataclass(frozen=True)
class Runs:
    """Folders by name, what each printed, and what was drawn for it."""

    folder: Path
    base: Path
    outcomes: dict[str, Outcome]


@pytest.fixture(scope="module")
def url(base: Path) -> Iterator[str]:
    """A server that was there before; each run gives it other weights."""
    with serving(Options(base / "sft" / "hf")) as server:
        yield server.url


@pytest.fixture(scope="module")
def runs(base: Path, url: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs of one process; some are the same run again, continued."""
    folder = tmp_path_factory.mktemp("vllm")
    there = {"name": "vllm", "url": url}
    cases = {
        "own": gipo(folder / "own", base, {"name": "sampling"}),
        "url": gipo(folder / "url", base, there),
        "broadcast": gipo(folder / "broadcast", base, {**there, "transfer": "broadcast"}),
        # lost in iteration 2, and replaced
        "replaced": gipo(
            folder / "replaced",
            base,
            served("--fault", "die:40", "--once", str(folder / "died")),
        ),
        # lost in iteration 2, in the evaluation after it, and there at last
        "lost": gipo(folder / "lost", base, served("--fault", "die:40", restarts=0)),
        "lost_again": gipo(folder / "lost", base, served("--fault", "die:20", restarts=0)),
        "continued": gipo(folder / "lost", base, there),
        "absent": gipo(folder / "absent", base, {"name": "vllm", "url": "http://127.0.0.1:9"}),
    }
    noisy(base, folder / "noisy")
    for name, rollout in (("own", {"name": "sampling"}), ("url", there), ("serve", served())):
        cases[f"eval_{name}"] = evaluation(folder / f"eval_{name}", base, folder, rollout)
    found = chain.outcomes(list(cases.values()), folder)
    return Runs(folder, base, dict(zip(cases, found, strict=True)))


def held_out(directory: Path, step: int) -> list[str]:
    lines = (directory / "held_out.jsonl").read_text().splitlines()
    return [row["response"] for row in map(json.loads, lines) if row["step"] == step]


def test_a_run_has_the_metrics_of_the_own_decoder(runs: Runs) -> None:
    assert [runs.outcomes[name].error for name in ("own", "url", "broadcast")] == ["", "", ""]
    own, other = chain.rows(runs.folder / "own"), chain.rows(runs.folder / "url")
    assert [row.keys() for row in own] == [row.keys() for row in other]
    assert [row["step"] for row in other] == [0, 1, 2]
    assert (runs.folder / "url" / "final").exists()
    for row in other[1:]:  # the server's log-probs are those of the pushed weights
        gap = row["rollout/logprob_gap_max"]
        assert gap is not None and gap < 1e-4


def test_greedy_responses_are_the_own_decoders(runs: Runs) -> None:
    """Before the first step, when both have the same weights, in fp32."""
    own, other = (held_out(runs.folder / name, 0) for name in ("own", "url"))
    assert own == other and len(own) == 8


def test_an_evaluation_draws_the_own_decoders_responses(runs: Runs) -> None:
    """Of two policies, one after the other in one server, which ends with the evaluation."""
    found = [stored(runs, f"eval_{name}") for name in ("own", "url", "serve")]
    assert found[0] == found[1] == found[2] and len(found[0]) == 2 * 9
    texts = {text for (policy, _), (text, _) in found[0].items() if policy == "noisy"}
    assert len(texts) >= 8
    assert (runs.folder / "eval_serve" / "results.json").is_file()
    assert not left_over(runs.folder / "eval_serve")


def stored(runs: Runs, name: str) -> dict[tuple[str, str], tuple[str, int]]:
    """(policy, prompt) -> response, its tokens."""
    assert runs.outcomes[name].error == ""
    lines = [
        json.loads(line)
        for file in (runs.folder / name / "responses").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    rows = [row for row in lines if "policy" in row]
    return {(row["policy"], row["prompt_id"]): (row["text"], row["tokens"]) for row in rows}


def test_broadcast_and_file_bring_the_same_weights(runs: Runs) -> None:
    chain.same_story(runs.folder / "broadcast", runs.folder / "url")


def test_a_lost_server_is_replaced_and_nothing_changes(runs: Runs) -> None:
    assert runs.outcomes["replaced"].error == "" and (runs.folder / "died").exists()
    chain.same_story(runs.folder / "replaced", runs.folder / "url")
    log = (runs.folder / "replaced" / "vllm" / "server.log").read_text()
    assert log.count("fake server starts") == 2
    assert not left_over(runs.folder / "replaced")


def test_a_run_without_its_server_saves_and_continues(runs: Runs) -> None:
    """Lost in a rollout, then in the evaluation that was due: each step is done once."""
    for name in ("lost", "lost_again"):
        error = runs.outcomes[name].error
        assert "the rollout server was lost, and its restarts (0) are used up" in error
        assert "fake server starts" in error and "the same command continues" in error
        assert len(error.splitlines()) < 30
    assert runs.outcomes["continued"].error == ""
    assert "resumed" in runs.outcomes["lost_again"].printed
    chain.same_story(runs.folder / "lost", runs.folder / "url")
    names = {path.name for path in (runs.folder / "lost" / "checkpoints").iterdir()}
    assert {"step_1", "step_2"} <= names
    assert not left_over(runs.folder / "lost")


def test_a_url_without_a_server_ends_the_run_before_it_begins(runs: Runs) -> None:
    error = runs.outcomes["absent"].error
    assert "http://127.0.0.1:9" in error and "start the server" in error
    assert not (runs.folder / "absent" / "metrics.jsonl").exists()


def test_every_layout_draws_the_same_responses(base: Path, runs: Runs, url: str) -> None:
    there = {"name": "vllm", "url": url}
    layouts = {
        "tp2": ["parallel.tensor=2"],
        "pp2": ["parallel.pipeline=2"],
        "dp2": [],
    }
    cases = [
        gipo(runs.folder / name, base, there, "run.steps=1", *more)
        for name, more in layouts.items()
    ]
    lost = runs.folder / "lost_tp2"
    lose_amid_two(lost, base)
    words = ("parallel.tensor=2", "run.eval_every=0")
    cases.append(gipo(lost, base, there, *words))
    chain.run_cases(cases, runs.folder, processes=2)
    assert [row["step"] for row in chain.rows(lost)] == [1, 2]
    alone = chain.rows(runs.folder / "url")
    for name in layouts:
        other = chain.rows(runs.folder / name)
        assert [row["step"] for row in other] == [0, 1]
        if name != "dp2":  # the first replica's alone are written
            assert held_out(runs.folder / name, 0) == held_out(runs.folder / "url", 0)
        for mine, its in zip(alone, other, strict=False):
            compared = [key for key in mine if key in its and key.startswith(("rollout/", "eval/"))]
            assert compared
            far = {k: (mine[k], its[k]) for k in compared if not chain.close(mine[k], its[k], 1e-3)}
            assert not far, (name, far)


def lose_amid_two(directory: Path, base: Path) -> None:
    """Both ranks save together when the server is lost in iteration 2, and end by its error."""
    words = ("parallel.tensor=2", "run.eval_every=0")
    case = gipo(directory, base, served("--fault", "die:20", restarts=0), *words)
    file = directory.with_suffix(".json")
    file.write_text(json.dumps([case]))
    done = forked.run(ROOT / "tests" / "runs" / "worker.py", str(file), ranks=2, timeout=200)
    assert done.code == 1 and "its restarts (0) are used up" in done.stderr
    assert [row["step"] for row in chain.rows(directory)] == [1]
    assert (directory / "checkpoints" / "step_1" / "meta.json").is_file()


def test_ctrl_c_ends_the_server_too(base: Path, runs: Runs) -> None:
    """The terminal signals the process group: the step ends, with the server, then both end."""
    directory = runs.folder / "interrupted"
    words = gipo(directory, base, served(), "run.steps=50", "run.eval_every=0")
    with chain.running(words) as run:
        chain.wait_for(lambda: chain.logged(directory, 2), run)
        assert left_over(directory)
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=200)
    assert (run.returncode, err) == (0, "")
    assert "interrupted (SIGINT) at step" in out
    assert not left_over(directory)


def test_a_second_ctrl_c_stops_a_run_whose_server_hangs(base: Path, runs: Runs) -> None:
    directory = runs.folder / "hangs"
    rollout = served("--fault", "hang:0")
    with chain.running(gipo(directory, base, rollout, "run.eval_every=0")) as run:
        chain.wait_for((directory / "log.txt").exists, run)
        time.sleep(1.0)  # in the first rollout, which has no end
        run.send_signal(signal.SIGINT)
        time.sleep(2.5)
        assert run.poll() is None and left_over(directory)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=200)
    assert (run.returncode, err) == (130, f"{train.STOPPED}\n")
    assert not left_over(directory)


def left_over(directory: Path) -> list[int]:
    """Processes that name the run's folder, in any session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:  # it ended meanwhile
                continue
            if str(directory / "vllm").encode() in words:
                found.append(int(entry.name))
    return found
