"""Commands with keys in the environment, and the check of their end, for the trials of networks and
of texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.faults import runs, systems, world
from tools.faults.trial import Bench, expect
from tools.faults.world import GIPO, Finished

SECRETS = {
    "OPENAI_API_KEY": "sk-campaign/never+shown-0123456789",
    "VLLM_API_KEY": "vllm-campaign-never-shown-0123",
    "HF_TOKEN": "hf_CampaignNeverShown0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}
SCREEN = 40  # lines


def one_screen(done: Finished, code: int) -> None:
    text = done.stdout + done.stderr
    expect(done.code == code, f"not exit {code}: {done.tail()}")
    expect("Traceback" not in text, f"a traceback: {done.tail()}")
    expect(len(done.stderr.splitlines()) <= SCREEN, f"more than a screen: {done.tail()}")
    expect(not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), f"escapes: {done.tail()}")


def evaluation(folder: Path, base: Path, prompts: Mapping[str, str]) -> tuple[str, ...]:
    """Make the policies and write the recipe; return the words of the command."""
    systems.prepare(base)
    rows = [json.dumps({"prompt": text, "source": name}) + "\n" for name, text in prompts.items()]
    (folder / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    task = {"name": "short", "kind": "helpful", "data": "prompts.jsonl", "template": "hh"}
    recipe = {
        "defaults": ["base/evaluate", "hardware/cpu"],
        "model": {"tokenizer": "bytes"},
        "policies": {n: {"load": f"{base}/{p}/final"} for n, p in (("a", "other"), ("b", "sft"))},
        "tasks": [{**task, "prompts": 99, "max_length": 512}],
        "data_root": str(folder),
        "generation": {"max_response": 8, "temperature": 0},
        "judge": {"name": "openai", "model": "m", "concurrency": 2, "backoff": 0.05},
        "report": {"bootstrap": 50},
    }
    (folder / "evaluate.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    words = ("judge.timeout=1.5", "judge.retries=2", "run.dir=run")
    return ("evaluate", f"recipe={folder / 'evaluate.yaml'}", *words)


QUESTIONS = {f"q{i}": f"Write {'very ' * (i % 4)}number {i}." for i in range(6)}


def judged(bench: Bench, url: str, *more: str) -> Finished:
    """Run the evaluation of QUESTIONS, whose responses are there, in the trial's folder."""
    words = evaluation(bench.folder, bench.base, QUESTIONS)
    return command(bench.folder, *words, f"judge.base_url={url}/v1", *more)


def command(folder: Path, *words: str, **more: Any) -> Finished:
    return world.run(GIPO, *words, folder=folder, env=SECRETS, timeout=200, **more)


def sft(folder: Path, *words: str, **more: Any) -> Finished:
    return command(folder, "train", *runs.sft(Path("run"), "run.eval_every=2", *words), **more)
