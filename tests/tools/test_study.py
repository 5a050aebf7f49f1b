"""tools/study.py: the statistics by hand, the groups by brute force, and a run that continues."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gipo_megatron.errors import UserError
from tools import study
from tools.studies import cells, compare, inference, s2
from tools.studies.bandit import WorldSpec
from tools.studies.systems import split_threshold, with_mean_one


def test_holm_by_hand() -> None:
    """0.01 · 4, 0.02 · 3, then 0.03 · 2 = 0.06 is not below the 0.06 before it, 0.9 · 1."""
    assert inference.holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert inference.holm([0.6, 0.7]) == [1.0, 1.0]
    assert inference.holm([0.04, 0.05, 0.05]) == pytest.approx([0.12, 0.12, 0.12])


def test_sign_flips_are_counted() -> None:
    """Of the eight patterns of ±1, ±2, ±3, those with a sum of at least 6, of at least 4."""
    assert inference.sign_flip(np.array([1.0, 2.0, 3.0])) == 1 / 8
    assert inference.sign_flip(np.array([-1.0, 2.0, 3.0])) == 2 / 8
    assert inference.sign_flip(np.zeros(3)) == 1.0


def test_an_interval_of_seeds_contains_the_mean_and_little_more() -> None:
    x = np.random.default_rng(3).normal(5, 1, 400)
    low, high = inference.interval(x)
    assert x.mean() - low == pytest.approx(1.96 * x.std() / 20, rel=0.1)
    assert high - x.mean() == pytest.approx(1.96 * x.std() / 20, rel=0.1)
    assert inference.interval(np.full(4, 2.5)) == (2.5, 2.5)


def test_the_split_is_the_best_of_all_thresholds() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 7, generator=generator)
    ids = torch.randint(7, (5, 30), generator=generator)
    ids[0] = ids[0] % 2  # five prompts are not drawn
    found = split_threshold(values, ids)
    for row, drawn, threshold in zip(values, ids, found, strict=True):
        x = row[drawn].double()

        def between(at: float, x: torch.Tensor = x) -> float:
            high = x > at
            if high.all() or not high.any():
                return 0.0
            share = high.double().mean()
            return float(share * (1 - share) * (x[high].mean() - x[~high].mean()) ** 2)

        assert between(float(threshold)) == pytest.approx(max(map(between, x.tolist())))
        assert between(float(threshold)) > 0


def test_prices_have_mean_one_and_keep_their_bounds_and_order() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.01, 0.01, 0.01, 3.97], [0.5, 1.0, 1.0, 1.5]])
    c = with_mean_one(x.double(), 0.1, 3.0)
    assert torch.allclose(c.mean(1), torch.ones(3, dtype=torch.float64), atol=1e-9)
    assert float(c.min()) >= 0.1 and float(c.max()) <= 3.0
    # the last is cut to 3, and the others share the remaining 1
    assert c[1].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 3.0])
    assert c[2].tolist() == pytest.approx([0.5, 1.0, 1.0, 1.5])


# ----------------------------------------------------------------------------------- the comparison


def outcome(kl: list[float], gold: list[float], price: float) -> dict[str, np.ndarray]:
    x = np.array(gold)
    same = dict.fromkeys(("easy", "hard", "mean", "worse"), x)
    return {**same, "kl": np.array(kl), "price": np.full(2, price), "gap": 0 * x}


WORLD = compare.WorldCells(
    "by hand",
    {
        "ppo": {0.0: outcome([4, 8], [0.4, 0.8], 0.0)},
        "ppo_kl": {
            0.1: outcome([2, 4], [0.2, 0.6], 0.1),
            1.0: outcome([1, 2], [0.0, 0.2], 1.0),
        },
        "adaptive": {
            0.05: outcome([3, 5], [0.5, 0.7], 10**-0.5),
            0.3: outcome([1, 9], [9.0, 9.0], 2.0),
        },
    },
    cells.ETAS,
)


def test_differences_at_equal_kl_and_at_equal_price() -> None:
    """KL: 3 lies between 2 and 4, so 0.3; 5 a quarter of the way from 4 to 8, so 0.65. The second
    seed's 9 is beyond 8, so η 0.3 is left out for both. Price: the middle of the logs of 0.1 and
    1, so 0.1 and 0.4; a price of 2 is above every η."""
    at_kl = WORLD.difference("adaptive", "mean", "kl")
    assert at_kl is not None and at_kl.etas == [0.05]
    assert at_kl.values == pytest.approx([0.2, 0.05])
    at_price = WORLD.difference("adaptive", "mean", "price")
    assert at_price is not None and at_price.etas == [0.05]
    assert at_price.values == pytest.approx([0.4, 0.3])


def test_ppo_with_kl_is_compared_without_its_own_point() -> None:
    """The first seed: the line from (1, 0) to (4, 0.4) is 0.4 / 3 at 2; the second: from (2, 0.2)
    to (8, 0.8) it is 0.4 at 4. At η 1 nothing lies further out."""
    found = WORLD.expected("ppo_kl", 0.1, "mean", "kl")
    assert found == pytest.approx([0.4 / 3, 0.4])
    assert np.isnan(WORLD.expected("ppo_kl", 1.0, "mean", "kl")).all()


def test_where_the_curve_turns_back_the_higher_gold_counts() -> None:
    """From KL 0 to 4 and back to 2: at 3 gold is 0.3 on the way out and 0.7 on the way back."""
    kl, gold = np.array([0.0, 4.0, 2.0]), np.array([0.0, 0.4, 1.0])
    assert compare.highest(3.0, kl, gold) == pytest.approx(0.7)
    assert compare.highest(1.0, kl, gold) == pytest.approx(0.1)
    assert np.isnan(compare.highest(5.0, kl, gold))


def test_of_an_outcome_that_should_be_low_the_lowest_counts() -> None:
    """The curve of the test before, as gold and as gap."""
    curve = {0.0: (2.0, 1.0), 0.05: (4.0, 0.4), 0.1: (0.0, 0.0)}
    points = {
        eta: outcome([kl, kl], [y, y], eta) | {"gap": np.array([y, y])}
        for eta, (kl, y) in curve.items()
    }
    system = {0.3: outcome([3, 3], [0, 0], 0.3)}
    world = compare.WorldCells("", {"ppo_kl": points, "x": system}, [0.3])
    assert world.expected("x", 0.3, "mean", "kl") == pytest.approx([0.7, 0.7])
    assert world.expected("x", 0.3, "gap", "kl") == pytest.approx([0.3, 0.3])


def test_nothing_is_extrapolated() -> None:
    far = replace(WORLD, of={**WORLD.of, "adaptive": {0.3: WORLD.of["adaptive"][0.3]}})
    assert far.difference("adaptive", "mean", "kl") is None


def test_the_best_price_of_a_seed_is_chosen_on_the_other() -> None:
    """The first seed's gold is best at η 0.1, the second's at 1: each gets the other's choice."""
    cells_ = {0.1: outcome([1, 1], [0.9, 0.1], 0.1), 1.0: outcome([1, 1], [0.2, 0.6], 1.0)}
    values, etas = compare.WorldCells("", {"x": cells_}, []).best("x")
    assert etas == [1.0, 0.1]
    assert values["mean"].tolist() == [0.2, 0.1]


def difference(*values: float) -> compare.Difference:
    return compare.Difference(np.array(values), [0.1])


@pytest.mark.parametrize(
    ("worse", "mean", "p", "verdict"),
    [
        (difference(0.1, 0.2), difference(-0.01, 0.0), 0.01, "shown"),
        (difference(-0.1, 0.2), difference(0.0, 0.0), 0.01, "not above 0"),
        (difference(0.1, 0.2), difference(0.0, 0.0), 0.2, "p after Holm"),
        (difference(0.1, 0.2), difference(-0.03, 0.3), 0.01, "the mean's lower bound"),
        (None, None, None, "outside of the curve"),
    ],
)
def test_verdicts(
    worse: compare.Difference | None,
    mean: compare.Difference | None,
    p: float | None,
    verdict: str,
) -> None:
    found = compare.Finding(True, "", "adaptive", "kl", worse, mean, p).verdict
    assert found == "shown" if verdict == "shown" else verdict in found


# ------------------------------------------------------------------------------------- the command


@pytest.fixture
def one_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (cells, s2):
        monkeypatch.setattr(module, "WORLDS", [WorldSpec("easy", 1.0)])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("one_world")
def test_a_second_start_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["s2", "seeds=2", "steps=2", f"out={tmp_path}"]
    study.main(words)
    file = tmp_path / "cells.jsonl"
    first = cells.load(file, 2, 2)
    number = 1 + len(cells.etas_of("ppo_kl")) + 9 * 5
    assert len(first) == number
    page = (tmp_path / "s2_tables.md").read_text(encoding="utf-8")
    assert f"{number} of {number} cells" in page and "hacks easy, offset 1" in page
    assert (tmp_path / "s2.svg").stat().st_size > 10_000
    assert len((tmp_path / "s2.csv").read_text(encoding="utf-8").splitlines()) == number + 1

    torn = file.read_bytes()
    file.write_bytes(torn[: torn.rindex(b"\n", 0, -1) + 40])
    assert len(cells.load(file, 2, 2)) == number - 1
    capsys.readouterr()
    study.main(words)
    assert [line for line in capsys.readouterr().out.splitlines() if " in " in line] == [
        "hacks easy, offset 1: group_dro in 0 s"
    ]
    again = cells.load(file, 2, 2)
    for a, b in itertools.zip_longest(first, again):
        assert (a.system, a.eta) == (b.system, b.eta)
        assert a.trace["gold_hard"] == [
            pytest.approx(row, abs=1e-5) for row in b.trace["gold_hard"]
        ]


@pytest.mark.usefixtures("one_world")
def test_tables_need_a_whole_curve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no world is complete"):
        study.main(["s2", f"out={tmp_path}", "train=false"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "no study is named"),
        (["s9"], "no study 's9'"),
        (["s2", "seeds=1"], "seeds=1"),
        (["s2", "steps=x"], "steps=x"),
        (["s2", "out="], "out="),
        (["s2", "train=maybe"], "train=maybe"),
        (["s3", "workers=0"], "workers=0"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        study.main(words)
