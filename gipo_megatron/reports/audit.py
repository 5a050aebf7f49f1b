"""What a group classifier learnt: what p(high group) follows, how sure it is, and whether there are
two groups at all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score

from gipo_megatron import ops
from gipo_megatron.errors import UserError
from gipo_megatron.reports.runs import Points, Run, in_bins

SMALL_GROUP = 0.05  # of all responses: a group below has collapsed
# of ln 2: where all but 1 in 20 posteriors are above, nothing was learnt; p within 0.37 … 0.63
UNDECIDED = 0.95
EXEMPLARS = 4
FIRST_WORDS = 8
# groups/…, over training
SERIES = ("flip_rate", "flips", "label_entropy", "mass_min", "gap", "auc", "ami", "response_split")
_USER = re.compile(r"(?:\A|\n\n)Human:|<\|im_start\|>user\n")
_MARK = re.compile(r"\n\nAssistant:|<\|im_start\|>|<\|im_end\|>")


@dataclass(frozen=True)
class Row:
    """One response with the group its prompt was put into. length: of the response, in tokens."""

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
    """p_high of the rows with a given label (a source, a first word). auc: P(p_high is larger than
    of a row without it), ties one half."""

    name: str
    count: int
    p_high: float
    auc: float | None


@dataclass(frozen=True)
class Entropy:
    """Of the posteriors, in nats: 0 certain … ln 2 undecided. `bins`: counts in ten equal parts of
    [0, ln 2]."""

    mean: float
    quantiles: dict[str, float]  # "5", "25", "50", "75", "95"
    bins: list[int]


@dataclass(frozen=True)
class Exemplar:
    prompt: str
    response: str
    source: str
    p_high: float
    score: float | None
    length: float


@dataclass(frozen=True)
class Audit:
    """`asdict` is JSON: finite numbers and None."""

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
    exemplars: dict[str, list[Exemplar]]  # high, low: the most certain; uncertain
    alarms: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def audit_run(run: Run) -> Audit:
    """Of the last fifth of the sampled steps. Raises UserError where no sample has a p_high, or
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
    there = [
        row
        for row in run.samples
        if finite(row.get("p_high")) is not None and isinstance(row.get("prompt"), str)
    ]
    if not there:
        raise UserError(
            "no sample with p_high",
            where=str(run.path / "samples.jsonl"),
            fix="audit a PPO or GIPO run with a group_classifier",
        )
    steps = sorted({row["step"] for row in there})
    last = steps[-max(1, len(steps) // 5) :]
    rows = [_row(row) for row in there if row["step"] >= last[0]]
    history = {
        name: in_bins(*run.series(f"groups/{name}"))
        for name in SERIES
        if run.series(f"groups/{name}")[0]
    }
    return audit_rows(run.name, rows, (last[0], last[-1]), history)


def _row(row: Mapping[str, Any]) -> Row:
    response = str(row.get("response", ""))
    length = finite(row.get("length"))
    return Row(
        prompt=row["prompt"],
        response=response,
        source=str(row.get("source", "")),
        p_high=float(row["p_high"]),
        length=float(len(response.split())) if length is None else length,
        score=finite(row.get("score")),
        kl=finite(row.get("kl")),
    )


def finite(value: Any) -> float | None:
    """Return a finite number as float; None for anything else."""
    there = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if there else None


def audit_rows(
    name: str,
    rows: list[Row],
    steps: tuple[int, int] | None = None,
    history: Mapping[str, Points] | None = None,
) -> Audit:
    """Return the audit of at least one response. `history`: groups/… over training."""
    high = np.clip([row.p_high for row in rows], 0.0, 1.0)
    entropies = _entropies(high)
    sources = [row.source for row in rows]
    several = len(set(sources)) > 1
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
            quantiles={str(q): float(np.quantile(entropies, q / 100)) for q in (5, 25, 50, 75, 95)},
            bins=np.histogram(entropies, 10, (0.0, math.log(2)))[0].tolist(),
        ),
        history=dict(history or {}),
        exemplars=_exemplars(rows),
        alarms=_alarms(high, entropies),
    )


def _entropies(high: np.ndarray) -> np.ndarray:
    """H(p) = −p ln p − (1 − p) ln(1 − p), at most ln 2."""
    p = np.stack([high, 1 - high])
    return np.minimum(-(p * np.log(np.where(p > 0, p, 1.0))).sum(0), math.log(2))


# ---------------------------------------------------------------------------------- what it follows


def _associations(rows: list[Row]) -> list[Association]:
    """With what is known of a response, then with simple features of the prompt; strongest
    (Spearman) of each first."""
    of_response: dict[str, list[float | None]] = {
        "score": [row.score for row in rows],
        "response length": [row.length for row in rows],
        "KL": [row.kl for row in rows],
    }
    features = [prompt_features(row.prompt) for row in rows]
    of_prompt: dict[str, list[float | None]] = {
        name: [f[name] for f in features] for name in features[0]
    }
    found = []
    for part in (of_response, of_prompt):
        measured = [
            _association(name, values, rows)
            for name, values in part.items()
            if any(v is not None for v in values)
        ]
        found += sorted(measured, key=lambda a: -abs(a.spearman or 0.0))
    return found


def _association(name: str, values: list[float | None], rows: list[Row]) -> Association:
    pairs = np.array(
        [(value, row.p_high) for value, row in zip(values, rows, strict=True) if value is not None],
        dtype=float,
    )
    x, y = pairs.T
    return Association(name, correlation(x, y), correlation(_ranks(x), _ranks(y)), len(pairs))


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's r; None for fewer than three points or where one does not vary."""
    if (
        len(x) < 3
        or np.ptp(x) <= 1e-12 * max(1.0, np.abs(x).max())
        or np.ptp(y) <= 1e-12 * max(1.0, np.abs(y).max())
    ):
        return None
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1.0, 1.0))


def _ranks(x: np.ndarray) -> np.ndarray:
    """From 1; equal values share their mean rank."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def prompt_features(prompt: str) -> dict[str, float | None]:
    """What anybody could sort prompts by: length in characters, user turns, a question mark or a
    digit in the last user turn."""
    last = last_turn(prompt)
    return {
        "prompt length": float(len(prompt)),
        "turns": float(max(1, len(_USER.findall(prompt)))),
        "question mark": float("?" in last),
        "digits": float(any(c.isdigit() for c in last)),
    }


def last_turn(prompt: str) -> str:
    """What the user said last, in a Human:/Assistant: or ChatML prompt; any other prompt whole."""
    return _MARK.split(_USER.split(prompt)[-1])[0].strip()


def _first_word(prompt: str) -> str:
    words = re.findall(r"\w[\w'’]*", last_turn(prompt))
    return words[0].lower() if words else ""


def _labels(labels: list[str], high: np.ndarray) -> list[Label]:
    """Most frequent first."""
    x = torch.from_numpy(high)
    found = []
    for name in dict.fromkeys(labels):
        mine = np.array([label == name for label in labels])
        auc = (
            None
            if mine.all()
            else float(ops.auc(torch.from_numpy(mine), x, torch.zeros(len(x), dtype=torch.long)))
        )
        found.append(Label(name, int(mine.sum()), float(high[mine].mean()), auc))
    return sorted(found, key=lambda label: -label.count)


# -------------------------------------------------------------------------- who, and whether at all


def _exemplars(rows: list[Row]) -> dict[str, list[Exemplar]]:
    """Each prompt once a list."""

    def first(ordered: list[Row]) -> list[Exemplar]:
        once: dict[str, Row] = {}
        for row in ordered:
            once.setdefault(row.prompt, row)
        return [
            Exemplar(r.prompt, r.response, r.source, r.p_high, r.score, r.length)
            for r in list(once.values())[:EXEMPLARS]
        ]

    return {
        "high": first(sorted((r for r in rows if r.p_high > 0.5), key=lambda r: -r.p_high)),
        "low": first(sorted((r for r in rows if r.p_high < 0.5), key=lambda r: r.p_high)),
        "uncertain": first(sorted(rows, key=lambda r: abs(r.p_high - 0.5))),
    }


def _alarms(high: np.ndarray, entropies: np.ndarray) -> list[str]:
    """A group's size is the smaller of its mass and of its share of the hard labels."""
    surest = float(np.quantile(entropies, 0.05))
    if surest > UNDECIDED * math.log(2):
        return [
            f"nothing learnt: the posteriors stay near one half (entropy {surest:.3f} or more for"
            f" 95 % of the responses; undecided is ln 2 = {math.log(2):.3f}). Train longer, raise"
            " group_classifier.lr or beta_critic, or look whether returns differ at all."
        ]
    sizes = {
        "high": min(high.mean(), (high > 0.5).mean()),
        "low": min((1 - high).mean(), (high < 0.5).mean()),
    }
    name, size = min(sizes.items(), key=lambda item: item[1])
    if size < SMALL_GROUP:
        return [
            f"collapse: the {name} group holds {100 * size:.1f} % of the responses (alarm below"
            f" {100 * SMALL_GROUP:.0f} %). There is one group in all but name; a gap between groups"
            " says nothing."
        ]
    return []
