"""Audit of a group classifier: what p(high group) follows, how certain it is, and whether there are
two groups at all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import entr
from scipy.stats import rankdata
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score

from gipo_megatron.errors import UserError
from gipo_megatron.reports.runs import Points, RunFolder, finite, in_bins
from gipo_megatron.statistics import correlation

SMALL_GROUP = 0.05  # of all responses: a group below has collapsed
# of ln 2: the classifier learnt nothing if 95 % of the entropies are above (0.37 < p < 0.63)
UNDECIDED = 0.95
EXEMPLARS = 4
FIRST_WORDS = 8
# groups/…, over training
SERIES = ("flip_rate", "flips", "label_entropy", "mass_min", "gap", "auc", "ami", "response_split")
_USER = re.compile(r"(?:\A|\n\n)Human:|<\|im_start\|>user\n")
_MARK = re.compile(r"\n\nAssistant:|<\|im_start\|>|<\|im_end\|>")


@dataclass(frozen=True)
class Row:
    """One response and its p(high group). length: of the response, in tokens."""

    prompt: str
    response: str
    source: str
    p_high: float
    length: float
    score: float | None
    kl: float | None


@dataclass(frozen=True)
class Association:
    """p_high against a quantity; None where one of them does not vary."""

    quantity: str
    pearson: float | None
    spearman: float | None
    count: int


@dataclass(frozen=True)
class Label:
    """p_high of the rows with a label (a source, a first word). auc: P(p_high of such a row is
    larger than of another row), ties one half."""

    name: str
    count: int
    p_high: float
    auc: float | None


@dataclass(frozen=True)
class Entropy:
    """Entropy of the posteriors in nats, 0 certain … ln 2 undecided. `bins`: counts in ten equal
    parts of [0, ln 2]."""

    mean: float
    quantiles: dict[str, float]  # "5", "25", "50", "75", "95"
    bins: list[int]


@dataclass(frozen=True)
class Audit:
    """`as_json` holds finite numbers and None."""

    name: str
    rows: int
    steps: tuple[int, int] | None  # of the rows; None: of an evaluation
    mass_high: float  # mean p_high
    share_high: float  # share with p_high > 1/2
    associations: list[Association]
    sources: list[Label]
    first_words: list[Label]
    # adjusted mutual information of source and hard group; None for one source
    source_ami: float | None
    entropy: Entropy
    history: dict[str, Points]  # groups/… over the steps; empty for an evaluation
    exemplars: dict[str, list[Row]]  # high, low: the most certain; uncertain
    alarms: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def audit_run(run: RunFolder) -> Audit:
    """Audit the last fifth of the sampled steps. Raises UserError where no sample has a p_high, or
    there are not two groups."""
    if run.series("groups/share_0")[0] and not run.series("groups/share_1")[0]:
        raise UserError(
            "the run has one group",
            where=str(run.path),
            fix="audit a run whose group_classifier is not none",
        )
    if run.series("groups/share_2")[0]:
        raise UserError(
            "an audit is for two groups",
            where=str(run.path),
            fix="with more, p_high is a rank and no posterior; see groups/ in its report",
        )
    samples = [
        row
        for row in run.samples
        if finite(row.get("p_high")) and finite(row.get("length")) and "prompt" in row
    ]
    if not samples:
        raise UserError(
            "no sample with p_high",
            where=str(run.path / "samples.jsonl"),
            fix="audit a run with a group_classifier",
        )
    steps = sorted({row["step"] for row in samples})
    last = steps[-max(1, len(steps) // 5) :]
    rows = [_row(row) for row in samples if row["step"] >= last[0]]
    series = {name: run.series(f"groups/{name}") for name in SERIES}
    history = {name: in_bins(*points) for name, points in series.items() if points[0]}
    return audit_rows(run.name, rows, (last[0], last[-1]), history)


def _row(sample: dict[str, Any]) -> Row:
    return Row(
        prompt=sample["prompt"],
        response=str(sample.get("response", "")),
        source=str(sample.get("source", "")),
        p_high=float(sample["p_high"]),
        length=float(sample["length"]),
        score=finite_or_none(sample.get("score")),
        kl=finite_or_none(sample.get("kl")),
    )


def finite_or_none(value: Any) -> float | None:
    return float(value) if finite(value) else None


def audit_rows(
    name: str,
    rows: list[Row],
    steps: tuple[int, int] | None = None,
    history: dict[str, Points] | None = None,
) -> Audit:
    """Audit the responses of one policy: scores and lengths of several do not compare."""
    high = np.clip([row.p_high for row in rows], 0.0, 1.0)
    # H(p) = −p ln p − (1 − p) ln(1 − p)
    entropies = np.minimum(entr(high) + entr(1 - high), math.log(2))
    sources = [row.source for row in rows]
    several = len(set(sources)) > 1
    quantiles = (5, 25, 50, 75, 95)
    return Audit(
        name=name,
        rows=len(rows),
        steps=steps,
        mass_high=float(high.mean()),
        share_high=float((high > 0.5).mean()),
        associations=_associations(rows),
        sources=_labels(sources, high),
        first_words=_labels([_first_word(row.prompt) for row in rows], high)[:FIRST_WORDS],
        source_ami=float(adjusted_mutual_info_score(sources, high > 0.5)) if several else None,
        entropy=Entropy(
            mean=float(entropies.mean()),
            quantiles={str(q): float(np.quantile(entropies, q / 100)) for q in quantiles},
            bins=np.histogram(entropies, 10, (0.0, math.log(2)))[0].tolist(),
        ),
        history=history or {},
        exemplars={
            "high": _first([r for r in rows if r.p_high > 0.5], lambda r: -r.p_high),
            "low": _first([r for r in rows if r.p_high < 0.5], lambda r: r.p_high),
            "uncertain": _first(rows, lambda r: abs(r.p_high - 0.5)),
        },
        alarms=_alarms(high, entropies),
    )


# ------------------------------------------------------------------------------------- associations


def _associations(rows: list[Row]) -> list[Association]:
    """Correlate p_high with figures of the response, then with features of the prompt; strongest
    (Spearman) of each first."""
    features = [prompt_features(row.prompt) for row in rows]
    of_response: dict[str, list[float | None]] = {
        "score": [row.score for row in rows],
        "response length": [row.length for row in rows],
        "KL": [row.kl for row in rows],
    }
    of_prompt: dict[str, list[float | None]] = {
        name: [f[name] for f in features] for name in features[0]
    }
    found = []
    for part in (of_response, of_prompt):
        measured = [_association(name, values, rows) for name, values in part.items()]
        found += sorted(measured, key=lambda a: -abs(a.spearman or 0.0))
    return [association for association in found if association.count]


def _association(name: str, values: list[float | None], rows: list[Row]) -> Association:
    pairs = [(v, row.p_high) for v, row in zip(values, rows, strict=True) if v is not None]
    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    spearman = correlation(rankdata(x), rankdata(y))
    return Association(name, correlation(x, y), spearman, len(pairs))


def prompt_features(prompt: str) -> dict[str, float]:
    """Return simple features: length in characters, user turns, a question mark or a digit in the
    last user turn."""
    last = last_turn(prompt)
    return {
        "prompt length": float(len(prompt)),
        "turns": float(max(1, len(_USER.findall(prompt)))),
        "question mark": float("?" in last),
        "digits": float(any(c.isdigit() for c in last)),
    }


def last_turn(prompt: str) -> str:
    """Return the last user turn of a Human:/Assistant: or ChatML prompt; any other prompt whole."""
    return _MARK.split(_USER.split(prompt)[-1])[0].strip()


def _first_word(prompt: str) -> str:
    words = re.findall(r"\w[\w'’]*", last_turn(prompt))
    return words[0].lower() if words else ""


def _labels(labels: list[str], high: np.ndarray) -> list[Label]:
    """Return one Label per name, most frequent first."""
    found = []
    for name in dict.fromkeys(labels):
        mine = np.array([label == name for label in labels])
        auc = None if mine.all() else float(roc_auc_score(mine, high))
        found.append(Label(name, int(mine.sum()), float(high[mine].mean()), auc))
    return sorted(found, key=lambda label: -label.count)


# ---------------------------------------------------------------------------------------- certainty


def _first(rows: list[Row], key: Callable[[Row], float]) -> list[Row]:
    """Return the EXEMPLARS rows with the lowest key, each prompt once."""
    once: dict[str, Row] = {}
    for row in sorted(rows, key=key):
        once.setdefault(row.prompt, row)
    return list(once.values())[:EXEMPLARS]


def _alarms(high: np.ndarray, entropies: np.ndarray) -> list[str]:
    """Return at most one alarm. A group's size: the smaller of its mass and its share of labels."""
    surest = float(np.quantile(entropies, 0.05))
    if surest > UNDECIDED * math.log(2):
        return [
            f"nothing learnt: the posteriors stay near one half (entropy {surest:.3f} or more for"
            f" 95 % of the responses; undecided is ln 2 = {math.log(2):.3f}). Train longer, raise"
            " group_classifier.lr or beta_critic, or check whether returns differ at all."
        ]
    sizes = {
        "high": min(high.mean(), (high > 0.5).mean()),
        "low": min((1 - high).mean(), (high < 0.5).mean()),
    }
    name, size = min(sizes.items(), key=lambda item: item[1])
    if size < SMALL_GROUP:
        return [
            f"collapse: the {name} group holds {100 * size:.1f} % of the responses (alarm below"
            f" {100 * SMALL_GROUP:.0f} %). In effect there is one group, and a gap between groups"
            " has no meaning."
        ]
    return []
