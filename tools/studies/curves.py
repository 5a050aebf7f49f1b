"""A cell of study S3: the numbers of one run, and the outcomes that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gipo_megatron.files import read_jsonl

# one evaluation is noisy: `final` is the mean of the last three, `peak` the highest of three in a
# row
WINDOW = 3
Curve = dict[str, list[float | None]]


@dataclass(frozen=True)
class Cell:
    """One run. Each list of `curve` has a number per evaluation (`curve_of`)."""

    seed: int
    system: str
    eta: float
    words: list[str]  # recipe and overrides, without folders
    curve: Curve


def curve_of(run: Path, every: int) -> Curve:
    """Read the evaluations of a run, one each `every` iterations.

    easy, hard, proxy and eval_kl are those of held-out prompts; the others are of the responses to
    training prompts. kl is the mean over the iterations nearest to the evaluation: a thousand
    responses, where eval_kl has one batch. questions, the share with a question mark, and label,
    how far the labels agree with the sources, are those of the last iteration before it.
    """
    rows = {row["step"]: row for _, row in read_jsonl(run / "metrics.jsonl")}
    evaluated = sorted(step for step, row in rows.items() if "eval/gold" in row)
    questions = _questions(run / "samples.jsonl", evaluated)
    curve: Curve = {
        name: []
        for name in ("step", "easy", "hard", "proxy", "kl", "eval_kl", "questions", "label")
    }  # fmt: skip
    for step in evaluated:
        row = rows[step]
        # row i is about responses of the policy after i - 1 updates
        near = [r["kl/mean"] for i, r in rows.items() if i and abs(i - 1 - step) <= every / 2]
        easy, hard = (row.get(f"source/{source}/p_high") for source in ("easy", "hard"))
        numbers = {
            "step": step,
            "easy": row["eval/gold/easy"],
            "hard": row["eval/gold/hard"],
            "proxy": row["eval/score"],
            "kl": float(np.mean(near)),
            "eval_kl": row["eval/kl"],
            "questions": questions[step],
            "label": None if easy is None or hard is None else (easy + 1 - hard) / 2,
        }
        for name, number in numbers.items():
            curve[name].append(number)
    return curve


def _questions(file: Path, steps: list[int]) -> dict[int, float | None]:
    """Return None for step 0, before which there are no training responses."""
    found: dict[int, list[bool]] = {step: [] for step in steps}
    for _, row in read_jsonl(file):
        if row["step"] in found:
            found[row["step"]].append("?" in row["response"])
    return {step: float(np.mean(answers)) if answers else None for step, answers in found.items()}


def outcomes(curve: Curve) -> dict[str, float]:
    """Return the numbers of one run that are compared; they are about the end of training but for
    peak, decline (peak - mean) and label, which is the mean over training."""
    x = {name: np.array(numbers, dtype=float) for name, numbers in curve.items()}
    x["mean"] = (x["easy"] + x["hard"]) / 2
    x["gap"] = x["easy"] - x["hard"]
    end = {name: float(numbers[-WINDOW:].mean()) for name, numbers in x.items()}
    width = min(WINDOW, len(x["mean"]))
    peak = float(np.convolve(x["mean"], np.full(width, 1 / width), "valid").max())
    label = x["label"][np.isfinite(x["label"])]
    return end | {
        "worse": min(end["easy"], end["hard"]),
        "peak": peak,
        "decline": peak - end["mean"],
        "label": float(label.mean()) if len(label) else float("nan"),
    }


def stacked(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Return the outcomes as arrays, a number per run."""
    return {name: np.array([run[name] for run in runs]) for name in runs[0]}
