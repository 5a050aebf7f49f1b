"""Run folders as a run would leave them, from closed formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.algorithms.sft import SFT

MARKUP = "<script>alert('boom')</script> & \"quotes\" {{ 7 * 7 }} $x^2$"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ppo_run(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 40,
    beta: float = 0.3,
    recipe: bool = True,
    per_step: int = 16,
) -> Path:
    """A PPO (beta 0) or GIPO run: the easy half's score rises faster, the more so without a
    variance term."""
    noise = np.random.Generator(np.random.PCG64(seed))
    folder.mkdir(parents=True)
    rows, samples = [], []
    for step in range(1, steps + 1):
        t = step / steps
        easy = 2.0 * (1 - math.exp(-3 * t)) * (1 - 0.3 * beta) + 0.05 * noise.standard_normal()
        hard = 1.0 * (1 - math.exp(-2 * t)) * (1 + 0.8 * beta) + 0.05 * noise.standard_normal()
        row: dict[str, Any] = {
            "step": step,
            "time/step_seconds": 2.5,
            "reward/score_mean": (easy + hard) / 2,
            "kl/mean": 6 * t + 0.2 * noise.standard_normal() ** 2,
            "kl/coef_mean": 0.05,
            "groups/return_high": easy,
            "groups/return_low": hard,
            "groups/gap": easy - hard,
            "groups/auc": 0.5 if step > 1 else None,
            "source/harmless/score": easy,
            "source/helpful/score": hard if step % 3 else None,
            "weights/mean": 1.0,
            "weights/min": 1 - 1.5 * beta * (easy - hard),
            "weights/max": 1 + 1.5 * beta * (easy - hard),
            "value/explained_variance": 1 - 4 * math.exp(-8 * t),
            "value/loss": math.exp(-3 * t),
            "rollout/length_mean": 40 + 10 * t,
            "rollout/truncated": 0.1 * t,
        }
        if step % 10 == 0:
            row |= {"eval/score": row["reward/score_mean"] - 0.1, "eval/gold": easy - 0.8 * t}
        rows.append(row)
        for i in range(per_step):
            score = (easy if i % 2 else hard) + 0.6 * noise.standard_normal()
            p = 1 / (1 + math.exp(-3 * t * (1 if i % 2 else -1) - noise.standard_normal()))
            samples.append(
                {
                    "step": step,
                    "sample_id": step * per_step + i,
                    "source": ("helpful", "harmless")[i % 2],
                    "prompt": f"Human: question {i}\n\nAssistant:",
                }
                | {
                    "response": f" answer {i} {MARKUP}",
                    "score": score,
                    "p_high": p,
                    "weight": 1.0,
                    "kl": 6 * t,
                    "length": int(30 + 20 * noise.random()),
                }
            )
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "samples.jsonl", samples)
    write_rows(
        folder / "alerts.jsonl",
        [{"step": 7, "message": "step 7: groups/mass_min = 0.03 < 0.05: a group <collapsed>"}],
    )
    if recipe:
        name = "group_variance" if beta else "none"
        text = f"algorithm:\n  name: ppo\n  variance_regulariser: {{name: {name}, beta: {beta}}}\n"
        text += f"run: {{dir: {json.dumps(folder.name)}, seed: {seed}}}\nnote: <b>bold</b>\n"
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        (folder / "environment.json").write_text(
            json.dumps({"git": "<abc>", "stage": PPO.stage, "headline": PPO.headline}),
            encoding="utf-8",
        )
    return folder


def sft_run(folder: Path, *, steps: int = 8) -> Path:
    folder.mkdir(parents=True)
    write_rows(
        folder / "metrics.jsonl",
        [{"step": s, "time/step_seconds": 0.5, "sft/loss": 5.0 / s} for s in range(1, steps + 1)],
    )
    (folder / "recipe.yaml").write_text(
        "algorithm: {name: sft}\nrun: {seed: 0}\n", encoding="utf-8"
    )
    about = {"stage": SFT.stage, "headline": SFT.headline}
    (folder / "environment.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


EVALUATED = 60  # held-out prompts of a source


def with_gold(folder: Path, curves: dict[str, list[float]], kl: float = 3.0) -> Path:
    """Add evaluations to a run's rows, evenly over its steps, and its last evaluation's responses.

    curves: source -> share of its EVALUATED prompts whose gold is 1; the first ones are right, the
    others have gold 0.
    """
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    count = len(next(iter(curves.values())))
    every = rows[-1]["step"] // (count - 1)
    for row in rows:
        row.pop("eval/gold", None)
    by_step = {row["step"]: row for row in [{"step": 0}, *rows]}
    responses = []
    for i in range(count):
        right = {source: round(shares[i] * EVALUATED) for source, shares in curves.items()}
        row = by_step[i * every]
        row["eval/kl"] = kl * i / (count - 1)
        row["eval/gold"] = sum(right.values()) / (EVALUATED * len(curves))
        for source, number in right.items():
            row[f"eval/gold/{source}"] = number / EVALUATED
            row[f"eval/prompts/{source}"] = EVALUATED
            responses += [
                {"step": i * every, "prompt": f"{source} {k}", "source": source}
                | {"response": "a", "score": 1.0, "gold": float(k < number)}
                for k in range(EVALUATED)
            ]
    write_rows(file, list(by_step.values()))
    write_rows(folder / "held_out.jsonl", responses)
    return folder
