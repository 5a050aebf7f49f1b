"""Statistics of comparisons and responses, with intervals. Pure: lists in, JSON values out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from gipo_megatron.evaluation.types import FAILED, LOSE, TIE, WIN, Comparison, Response

OUTCOMES = (WIN, TIE, LOSE)
HIGH, LOW = "high", "low"  # inferred groups of prompts
MIN_LENGTH_CONTROLLED = 10  # judged prompts below which no regression is fitted
CHUNK = 2**20  # prompts drawn at once by the bootstrap

# A response is a refusal if its first REFUSAL_WINDOW characters contain one of these phrases
# (similar to AdvBench's prefixes; English only).
REFUSAL_WINDOW = 200
REFUSALS = (
    "i'm sorry, but", "i am sorry, but", "i apologize, but", "i can't", "i cannot", "i can not",
    "i'm unable to", "i am unable to", "i'm not able to", "i am not able to", "i won't",
    "i will not", "i'm not going to", "i am not going to", "i'm not comfortable",
    "i don't feel comfortable", "i must decline", "i have to decline", "as an ai",
    "as a language model", "it is not appropriate", "it's not appropriate",
    "not appropriate to", "is illegal and", "i don't want to help", "i don't think i should",
    "i shouldn't",
)  # fmt: skip


def counts(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """Return win, tie, lose (their sum is n, the judged prompts), failed, flipped (of the ties)."""
    outcomes = [c.outcome for c in comparisons]
    found = {name: outcomes.count(name) for name in (WIN, TIE, LOSE, FAILED)}
    flipped = sum(c.flipped for c in comparisons)
    return found | {"flipped": flipped, "n": len(comparisons) - found[FAILED]}


def bootstrap(
    comparisons: Sequence[Comparison], *, resamples: int, seed: int
) -> dict[str, list[float] | None]:
    """Return percentile 95 % intervals of the shares of wins, ties and losses.

    Prompts are drawn with replacement, `resamples` times, after sorting by id: the bounds depend
    neither on the order of the comparisons nor on which side is the model. None without a judged
    prompt. If all outcomes are equal, the interval has no width and gives no information about
    outcomes that were not observed.
    """
    judged = sorted((c for c in comparisons if c.outcome != FAILED), key=lambda c: c.prompt_id)
    if not judged:
        return dict.fromkeys(OUTCOMES)
    # [P, 3]
    table = np.array([[c.outcome == name for name in OUTCOMES] for c in judged], dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, CHUNK // len(judged))
    shares = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(len(judged), size=(min(rows, resamples - start), len(judged)))
        shares.append(table[drawn].sum(axis=1) / len(judged))
    low, high = np.percentile(np.concatenate(shares), [2.5, 97.5], axis=0)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(OUTCOMES)}


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value of wins against losses; ties are left out.

    Integer arithmetic: scipy.stats.binomtest rounds differently in the last bits.
    """
    n, fewer = wins + losses, min(wins, losses)
    below = chosen = 1  # sum of, and last of, the binomial coefficients n over 0 … k
    for k in range(fewer):
        chosen = chosen * (n - k) // (k + 1)
        below += chosen
    return min(1.0, 2 * below / 2**n)


def preference(comparisons: Sequence[Comparison]) -> float | None:
    """Return (wins + ties / 2) / n, to compare with the length-controlled rate; None for n = 0."""
    c = counts(comparisons)
    return (c[WIN] + c[TIE] / 2) / c["n"] if c["n"] else None


def length_controlled(comparisons: Sequence[Comparison]) -> tuple[float | None, str]:
    """Return the preference rate if both responses were equally long, and a note.

    The idea of AlpacaEval 2 (Dubois et al. 2024): P(model preferred) = sigmoid(a + b tanh((len_m -
    len_b) / std(len_m - len_b))), a tie being half a win; the rate is sigmoid(a). b has a standard
    normal prior, which matters only for few or separable prompts. Lengths are tokens. None if a is
    not identified, with the reason.
    """
    judged = [c for c in comparisons if c.outcome != FAILED]
    won = np.array([{WIN: 1.0, TIE: 0.5, LOSE: 0.0}[c.outcome] for c in judged])
    longer = np.array([c.model_tokens - c.baseline_tokens for c in judged], dtype=np.float64)
    if len(judged) < MIN_LENGTH_CONTROLLED:
        return None, f"{len(judged)} judged prompts: at least {MIN_LENGTH_CONTROLLED} are needed"
    if won.min() == won.max() != 0.5:
        same = "wins" if won[0] else "losses"
        return None, f"all {len(judged)} judgements are {same}: no effect of length can be measured"
    if not longer.any():
        return float(won.mean()), "both responses have equal length everywhere: nothing to control"
    if longer.min() == longer.max():
        note = (
            f"the model's response is {longer[0]:+.0f} tokens long everywhere: no effect of length"
            " can be measured"
        )
        return None, note
    feature = np.tanh(longer / longer.std())
    # C=1: b ~ N(0, 1); a is free
    regression = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    # a tie is half of each
    both, label = np.concatenate([feature, feature])[:, None], np.repeat([1, 0], len(judged))
    regression.fit(both, label, sample_weight=np.concatenate([won, 1 - won]))
    rate = 1 / (1 + math.exp(-float(regression.intercept_[0])))
    if longer.min() <= 0 <= longer.max():
        return rate, ""
    which = "longer" if longer.min() > 0 else "shorter"
    return rate, f"extrapolated: the model's response is {which} everywhere"


def table_cell(comparisons: Sequence[Comparison], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return counts, ci95 (shares of n) and sign_test_p."""
    c = counts(comparisons)
    return {
        **c,
        "ci95": bootstrap(comparisons, resamples=resamples, seed=seed),
        "sign_test_p": sign_test(c[WIN], c[LOSE]),
    }


def compare(comparisons: Sequence[Comparison], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the cell of results.json for the model against one baseline on one task.

    Raises ValueError for two comparisons of one prompt: intervals and tests need independent
    prompts.
    """
    if len({c.prompt_id for c in comparisons}) != len(comparisons):
        raise ValueError("several comparisons of one prompt")
    rate, note = length_controlled(comparisons)

    def parts(name: Callable[[Comparison], str]) -> dict[str, Any]:
        split: dict[str, list[Comparison]] = {}
        for c in comparisons:
            split.setdefault(name(c), []).append(c)
        return {n: table_cell(split[n], resamples=resamples, seed=seed) for n in sorted(split) if n}

    return {
        **table_cell(comparisons, resamples=resamples, seed=seed),
        "preference": preference(comparisons),
        "length_controlled_win": rate,
        "length_controlled_note": note,
        "by_source": parts(lambda c: c.source),
        "by_group": parts(group),
    }


def group(comparison: Comparison) -> str:
    """Return HIGH for p_high > 0.5, LOW otherwise, "" without a group classifier."""
    if comparison.p_high is None:
        return ""
    return HIGH if comparison.p_high > 0.5 else LOW


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Return distinct n-grams / n-grams of lower-cased words over all texts (Li et al. 2016).

    None without an n-gram. It falls with the number of words: compare policies on the same prompts.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None


def refuses(text: str) -> bool:
    """Return whether the first REFUSAL_WINDOW characters contain one of REFUSALS."""
    start = " ".join(text[:REFUSAL_WINDOW].lower().replace("’", "'").split())
    return any(phrase in start for phrase in REFUSALS)


def policy_figures(responses: Sequence[Response]) -> dict[str, float | int | None]:
    """Return score, length (tokens), kl (nats a response), distinct_1, distinct_2, refusal_rate,
    finished (shares) and n.

    A mean is None if no response has the figure, or if one value is not finite.
    """
    texts = [r.text for r in responses]
    return {
        "score": _mean([r.figures["score"] for r in responses if "score" in r.figures]),
        "length": _mean([r.tokens for r in responses]),
        "kl": _mean([r.figures["kl"] for r in responses if "kl" in r.figures]),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "refusal_rate": _mean([refuses(text) for text in texts]),
        "finished": _mean([r.finished for r in responses]),
        "n": len(responses),
    }


def _mean(values: Sequence[float]) -> float | None:
    if not values or not all(map(math.isfinite, values)):
        return None
    return math.fsum(values) / len(values)
