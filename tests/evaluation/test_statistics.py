from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from gipo_megatron.evaluation.statistics import (
    bootstrap,
    compare,
    counts,
    distinct,
    length_controlled,
    policy_figures,
    preference,
    refuses,
    sign_test,
)
from gipo_megatron.evaluation.types import (
    FAILED,
    FIRST,
    LOSE,
    TIE,
    WIN,
    Comparison,
    Response,
    Verdict,
)
from tests.evaluation.simulated import comparison, comparisons, swap


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def drawn(shares: tuple[float, float, float], n: int, seed: int) -> list[Comparison]:
    return comparisons(*rng(seed).multinomial(n, shares).tolist())


def test_counts() -> None:
    assert counts(comparisons(5, 3, 2, failed=4, flipped=6)) == {
        "win": 5,
        "tie": 9,
        "lose": 2,
        "failed": 4,
        "flipped": 6,
        "n": 16,
    }
    assert counts([]) == {"win": 0, "tie": 0, "lose": 0, "failed": 0, "flipped": 0, "n": 0}


def test_the_intervals_hold_what_they_promise() -> None:
    """400 judges with known shares: about 95 % of the intervals contain them (standard error 1.1
    points)."""
    truth = (0.5, 0.3, 0.2)
    held = {"win": 0, "tie": 0, "lose": 0}
    trials = 400
    for trial in range(trials):
        ci = bootstrap(drawn(truth, 200, trial), resamples=500, seed=7)
        for name, share in zip(held, truth, strict=True):
            bounds = ci[name]
            assert bounds is not None
            held[name] += bounds[0] <= share <= bounds[1]
    assert all(0.915 < n / trials < 0.98 for n in held.values()), held


def test_the_bootstrap_is_the_binomials_spread() -> None:
    """Half of 400: 0.5 ± 1.96 · sqrt(0.25 / 400) = [0.451, 0.549]."""
    bounds = bootstrap(comparisons(200, 0, 200, failed=50), resamples=4000, seed=0)["win"]
    assert bounds == pytest.approx([0.451, 0.549], abs=0.004)
    assert bootstrap(comparisons(0, 0, 0, failed=3), resamples=100, seed=0) == {
        "win": None,
        "tie": None,
        "lose": None,
    }
    assert bootstrap(comparisons(30, 0, 0), resamples=100, seed=0) == {
        "win": [1.0, 1.0],
        "tie": [0.0, 0.0],
        "lose": [0.0, 0.0],
    }


def test_a_policy_against_itself_wins_as_often_as_it_loses() -> None:
    agreed = 0
    for seed in range(20):
        cell = compare(drawn((0.35, 0.3, 0.35), 300, seed), resamples=500, seed=seed)
        low, high = cell["ci95"]["win"]
        agreed += low <= cell["lose"] / cell["n"] <= high
    assert agreed >= 16
    same = compare(comparisons(70, 60, 70), resamples=500, seed=0)
    assert (
        same["ci95"]["win"][0] < same["lose"] / same["n"] < same["ci95"]["win"][1]
        and same["sign_test_p"] == 1.0
    )


def test_exchanging_the_sides_mirrors_the_table() -> None:
    generator = rng(3)
    kinds = (WIN, TIE, LOSE, FAILED, "flipped")
    given = [
        comparison(
            kinds[generator.choice(5, p=[0.4, 0.2, 0.2, 0.1, 0.1])],
            i,
            lengths=(int(generator.integers(5, 50)), int(generator.integers(5, 40))),
            source=f"s{i % 3}",
            p_high=float(generator.random()),
        )
        for i in range(150)
    ]
    shuffled = [swap(given)[i] for i in generator.permutation(len(given))]
    cell, mirrored = compare(given, resamples=300, seed=5), compare(shuffled, resamples=300, seed=5)

    def check(a: dict, b: dict) -> None:
        assert (a["win"], a["tie"], a["lose"]) == (b["lose"], b["tie"], b["win"])
        assert [a[k] for k in ("failed", "flipped", "n", "sign_test_p")] == [
            b[k] for k in ("failed", "flipped", "n", "sign_test_p")
        ]
        assert (
            a["ci95"]["win"] == b["ci95"]["lose"]
            and a["ci95"]["tie"] == b["ci95"]["tie"]
            and a["ci95"]["lose"] == b["ci95"]["win"]
        )

    check(cell, mirrored)
    assert len(cell["by_source"]) == 3 and list(cell["by_group"]) == ["high", "low"]
    for part in ("by_source", "by_group"):
        assert cell[part].keys() == mirrored[part].keys()
        for name in cell[part]:
            check(cell[part][name], mirrored[part][name])
        assert sum(c["n"] for c in cell[part].values()) == cell["n"]
    assert cell["preference"] == pytest.approx(1 - mirrored["preference"], abs=1e-12)
    assert cell["length_controlled_win"] == pytest.approx(
        1 - mirrored["length_controlled_win"], abs=1e-9
    )


def test_a_judge_that_always_says_first_yields_ties_and_flips() -> None:
    given = [
        Comparison("hh", "ppo", str(i), "", Verdict(FIRST), Verdict(FIRST), 5, 9) for i in range(40)
    ]
    cell = compare(given, resamples=100, seed=0)
    assert (cell["win"], cell["tie"], cell["lose"], cell["flipped"], cell["n"]) == (
        0,
        40,
        0,
        40,
        40,
    )
    assert (
        cell["ci95"] == {"win": [0.0, 0.0], "tie": [1.0, 1.0], "lose": [0.0, 0.0]}
        and cell["sign_test_p"] == 1.0
    )


def test_sign_test() -> None:
    assert sign_test(8, 2) == 2 * (1 + 10 + 45) / 1024  # by hand
    assert sign_test(0, 0) == sign_test(1, 1) == sign_test(1, 0) == 1.0
    checked = 0
    for wins, losses in ((3, 9), (50, 30), (600, 520), (0, 12), (5000, 4800)):
        assert sign_test(wins, losses) == pytest.approx(
            binomtest(wins, wins + losses).pvalue, rel=1e-9
        )
        assert sign_test(wins, losses) == sign_test(losses, wins)
        checked += 1
    assert checked == 5


def biased(rate: float, bias: float, n: int, seed: int) -> list[Comparison]:
    """A judge who prefers the model at `rate` among equal lengths, and longer answers by `bias`;
    the model is mostly longer."""
    generator = rng(seed)
    lengths = [
        (int(a), int(b))
        for a, b in zip(generator.poisson(60, n), generator.poisson(50, n), strict=True)
    ]
    longer = np.array([a - b for a, b in lengths])
    logit = np.log(rate / (1 - rate)) + bias * np.tanh(longer / longer.std())
    won = generator.random(n) < 1 / (1 + np.exp(-logit))
    return [
        comparison(WIN if w else LOSE, i, lengths=both)
        for i, (w, both) in enumerate(zip(won, lengths, strict=True))
    ]


def test_length_control_recovers_the_rate_of_equal_lengths() -> None:
    checked = 0
    for rate, bias in ((0.5, 1.5), (0.4, 1.0), (0.7, -1.0), (0.6, 0.0)):
        given = biased(rate, bias, 6000, seed=1)
        controlled, note = length_controlled(given)
        assert controlled == pytest.approx(rate, abs=0.03) and note == ""
        raw = preference(given)
        assert raw is not None
        assert (raw - rate) * bias > 0.05 or bias == 0  # the bias was there to be removed
        checked += 1
    assert checked == 4


def test_length_control_says_when_it_cannot() -> None:
    assert length_controlled(comparisons(5, 0, 3)) == (
        None,
        "8 judged prompts: at least 10 are needed",
    )
    value, note = length_controlled(comparisons(20, 0, 0))
    assert value is None and note.startswith("all 20 judgements are wins")
    assert "are losses" in length_controlled(comparisons(0, 0, 20))[1]
    assert length_controlled(comparisons(12, 4, 4)) == (
        0.7,
        "both responses have equal length everywhere: nothing to control",
    )
    constant = [comparison(WIN if i % 2 else LOSE, i, lengths=(12, 10)) for i in range(20)]
    assert length_controlled(constant)[0] is None and "+2 tokens" in length_controlled(constant)[1]
    ties = [comparison(TIE, i, lengths=(10 + i, 20)) for i in range(20)]
    assert length_controlled(ties)[0] == pytest.approx(0.5)
    # the longer answer always wins
    separable = [comparison(WIN if i >= 10 else LOSE, i, lengths=(10 + i, 20)) for i in range(20)]
    value, _ = length_controlled(separable)
    assert value is not None and 0.3 < value < 0.7
    longer = [comparison(WIN if i % 3 else LOSE, i, lengths=(20 + i, 10)) for i in range(20)]
    assert length_controlled(longer)[1] == "extrapolated: the model's response is longer everywhere"


def test_one_comparison_a_prompt() -> None:
    with pytest.raises(ValueError, match="several comparisons"):
        compare([comparison(WIN, 1), comparison(LOSE, 1)], resamples=10, seed=0)


def test_distinct_and_refusals() -> None:
    assert distinct(["a b a", "A b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct(["", "a"], 2) is None
    assert refuses("I’m sorry,  but I can not do that.") and refuses("Sure? No. I CANNOT help.")
    assert (
        not refuses("Of course! Here is how.")
        and not refuses("")
        and not refuses("word " * 60 + "I cannot")
    )


def test_figures_of_a_policy() -> None:
    rows = [
        Response("p", "t", "1", "I cannot.", 4, True, {"score": 1.0, "kl": 2.0}),
        Response("p", "t", "2", "", 0, False, {"score": 2.0, "kl": float("nan")}),
    ]
    figures = policy_figures(rows)
    assert figures == {
        "score": 1.5,
        "length": 2.0,
        "kl": None,
        "distinct_1": 1.0,
        "distinct_2": 1.0,
        "refusal_rate": 0.5,
        "finished": 0.5,
        "n": 2,
    }
    assert policy_figures([])["score"] is None and policy_figures([])["n"] == 0
