"""Tiny runs that take a second each, and the comparison of what two of them left."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from tools.faults import world
from tools.faults.trial import expect

ENDED = "ended_well"  # a file: seconds of a run without a fault
VOLATILE = ("time/", "perf/", "memory/", "rollout/tokens_per_second")
SMALL = [
    "model.architecture.num_layers=4",  # two pipeline stages with two chunks each
    "model.architecture.hidden_size=32",
    "model.architecture.ffn_hidden_size=64",
    "model.architecture.head_dim=8",
    "data.planted.prompts=40",
    "data.planted.held_out=0.2",
    "data.planted.pairs_per_prompt=6",
    "run.eval_prompts=8",
    "run.loggers=[]",
    "run.save_every=0",
]


def sft(directory: Path, *more: str) -> list[str]:
    return [
        "recipe=tiny/sft",
        *SMALL,
        "batch.minibatch=8",
        "batch.micro_batch=4",
        f"run.dir={directory}",
        "run.steps=3",
        "models.actor.warmup_steps=1",
        *more,
    ]


def reward_model(directory: Path, sft_dir: Path, *more: str) -> list[str]:
    batch = ["batch.minibatch=8", "batch.micro_batch=4", "models.reward.warmup_steps=1"]
    return [
        "recipe=tiny/rm",
        *SMALL,
        *batch,
        f"models.reward.load={sft_dir}/final",
        f"run.dir={directory}",
        "run.steps=3",
        *more,
    ]


def dpo(directory: Path, base: Path, *more: str, data: str = "with=data/planted") -> list[str]:
    batch = [
        "batch.minibatch=8",
        "batch.micro_batch=4",
        "models.actor.warmup_steps=1",
        "models.actor.schedule=constant",
    ]
    run = [
        f"models.actor.load={base}/sft/final",
        f"run.dir={directory}",
        "run.steps=4",
        "run.eval_every=2",
    ]
    return ["recipe=tiny/dpo", data, *SMALL, *batch, *run, *more]


def ppo(name: str, directory: Path, base: Path, *more: str) -> list[str]:
    batch = [
        "batch.prompts=8",
        "batch.responses=2",
        "batch.minibatch=8",
        "batch.micro_batch=4",
        "algorithm.critic_warmup=1",
    ]
    loads = [f"models.actor.load={base}/sft/final", f"models.reward.load={base}/rm/final"]
    return [
        f"recipe=tiny/{name}",
        *SMALL,
        *batch,
        *loads,
        f"run.dir={directory}",
        "run.steps=3",
        "run.eval_every=2",
        *more,
    ]


def rows(directory: Path) -> list[dict[str, float | None]]:
    """metrics.jsonl without what no two runs share."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(VOLATILE)} for line in lines
    ]


def tree(directory: Path) -> dict[str, str]:
    """Return every file and link with its content, but a killed run's lock, which is taken."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(directory))] = os.readlink(path)
        elif path.is_file() and path.name != "lock":
            found[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def difference(a: Path, b: Path) -> str:
    """Return the first difference between the stories of two runs, bit for bit; "" for none:
    metrics.jsonl (but for time, perf, memory), samples.jsonl, held_out.jsonl."""
    one, other = rows(a), rows(b)
    if (steps := [[row["step"] for row in rows] for rows in (one, other)])[0] != steps[1]:
        return f"steps {steps[0]}, not {steps[1]}"
    for mine, its in zip(one, other, strict=True):
        for key in mine.keys() | its.keys():
            if key not in mine or key not in its or mine[key] != its[key]:
                return f"step {mine['step']}: {key} {mine.get(key)}, not {its.get(key)}"
    for name in ("samples.jsonl", "held_out.jsonl"):
        found = [file.read_bytes() if (file := run / name).exists() else b"" for run in (a, b)]
        if found[0] != found[1]:
            return f"{name} differs"
    return ""


def logged(directory: Path, step: int) -> bool:
    """Return whether metrics.jsonl has that step's row."""
    file = directory / "metrics.jsonl"
    return file.exists() and f'{{"step": {step}, ' in file.read_text(encoding="utf-8")


def finished(
    folder: Path, *words: str, ranks: int = 1, before: Callable[[int], None] | None = None
) -> Path:
    """Run the command `words` in `folder`, unless it has ended well there before; return `folder`.

    Words that name run.dir=run leave FOLDER/run; FOLDER/ENDED has the seconds. Raises Lost when the
    command fails.
    """
    if not (folder / ENDED).exists():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        ended = world.run(
            world.GIPO, *words, ranks=ranks, folder=folder, before=before, timeout=300
        )
        expect(not ended.code and not ended.stderr, f"a run without a fault: {ended.tail()}")
        (folder / ENDED).write_text(f"{time.monotonic() - start:.2f}", encoding="utf-8")
    return folder


def trained(base: Path) -> Path:
    """Make BASE/sft and BASE/rm, each with final/ and hf/, where they are not there; return
    `base`."""
    export = "run.export_hf=true"
    finished(base / ".sft", "train", *sft(base / "sft", export))
    finished(base / ".rm", "train", *reward_model(base / "rm", base / "sft", export))
    return base
