from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.judges.human import (
    FORMAT,
    HumanJudge,
    agreement,
    assign,
    cohen_kappa,
    fleiss_kappa,
    import_ratings,
    swapped,
)
from gipo_megatron.evaluation.results import comparisons_from_verdicts, pairs_in_both_orders
from gipo_megatron.evaluation.types import FIRST, SECOND, TIE, Pair
from gipo_megatron.registry import lookup
from tests.evaluation.simulated import MARKUP, answers, head_to_head, prompts


def pairs(n: int, *, markup: bool = False) -> list[Pair]:
    """The model's response first."""
    asked = prompts(n)
    mine, theirs = (
        answers("gipo_policy", asked, markup=markup),
        answers("ppo_policy", asked, markup=markup),
    )
    return [
        Pair("hh", p.kind, p.prompt_id, p.question, a.text, b.text)
        for p, a, b in zip(asked, mine, theirs, strict=True)
    ]


def write_pages(
    directory: Path, given: list[Pair], raters: list[str], count: int, overlap: float, seed: int
) -> list[Path]:
    judge = HumanJudge(raters, count, overlap, seed, directory=directory)
    return judge.write_pages(given)


def page_data(path: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>',
        path.read_text(encoding="utf-8"),
        re.S,
    )
    assert found is not None
    return json.loads(found.group(1))


def export(page: Path, prefer: str, folder: Path, *, most: int = 1000) -> Path:
    """A rater who prefers the answer that begins with `prefer`; "" finds all equally good."""
    data = page_data(page)
    rows = []
    for item in data["items"][:most]:
        choice = "tie" if not prefer else "left" if item["left"].startswith(prefer) else "right"
        rows.append({"pair": item["id"], "choice": choice})
    out = folder / f"ratings_{data['rater']}.json"
    out.write_text(
        json.dumps(
            {
                "format": FORMAT,
                "study": data["study"],
                "rater": data["rater"],
                "ratings": rows,
                "of": len(data["items"]),
            }
        )
    )
    return out


MINE, THEIRS = "answer 11y", "answer 10y"


def test_pages_are_blind_and_hold_texts_as_text(tmp_path: Path) -> None:
    pages = write_pages(tmp_path, pairs(12, markup=True), ["ann", "bob"], 8, 0.5, 3)
    assert sorted(p.name for p in pages[0].parent.iterdir()) == ["ann.html", "bob.html", "key.json"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert (
            "policy" not in text.lower().replace("content-security-policy", "")
            and "hh-0" not in text
        )
        assert (
            text.count("<script") == 2
            and text.count("</script>") == 2
            and "onerror=alert" in html.unescape(text)
        )
        data = page_data(page)
        assert len(data["items"]) == 8 and set(data["items"][0]) == {
            "id",
            "ask",
            "question",
            "left",
            "right",
        }
        assert MARKUP in data["items"][0]["left"]
    before = [page.read_bytes() for page in pages] + [(pages[0].parent / "key.json").read_bytes()]
    again = write_pages(tmp_path, pairs(12, markup=True), ["ann", "bob"], 8, 0.5, 3)
    assert [page.read_bytes() for page in again] + [
        (pages[0].parent / "key.json").read_bytes()
    ] == before
    with pytest.raises(UserError, match="pages of another study"):
        write_pages(tmp_path, pairs(12, markup=True), ["ann", "bob"], 7, 0.5, 3)


def test_sides_are_fair_draws() -> None:
    drawn = {
        (rater, i): swapped(rater, f"{i:x}", 0) for rater in ("ann", "bob") for i in range(1000)
    }
    right = sum(drawn.values())
    assert 900 < right < 1100  # 2000 fair coins: standard deviation 22
    same = sum(drawn["ann", i] == drawn["bob", i] for i in range(1000))
    assert 430 < same < 570


def test_who_rates_what() -> None:
    pairs = [f"{i:03d}" for i in range(40)]
    given = assign(pairs, ["a", "b", "c"], 10, 0.4, 0)
    sets = [set(own) for own in given.values()]
    assert [len(own) for own in given.values()] == [10, 10, 10] and len(
        sets[0] & sets[1] & sets[2]
    ) == 4
    assert len(sets[0] | sets[1] | sets[2]) == 4 + 3 * 6 and given["a"] != sorted(given["a"])
    with pytest.raises(UserError, match="need 22 different pairs; there are 21"):
        assign(pairs[:21], ["a", "b", "c"], 10, 0.4, 0)


def test_ratings_become_comparisons(tmp_path: Path) -> None:
    asked = prompts(12)
    given = head_to_head("gipo_policy", ["ppo_policy"], asked)
    judge = HumanJudge(["ann", "bob"], 6, 0.5, 1, directory=tmp_path)
    pages = judge.write_pages(pairs(12))
    files = [export(pages[0], MINE, tmp_path), export(pages[1], THEIRS, tmp_path)]
    ratings = import_ratings(files, judge.folder / "key.json")
    assert ratings.progress == {"ann": [6, 6], "bob": [6, 6]} and len(ratings.votes) == 9
    judge.ratings = [str(file) for file in files]
    outcomes = []
    for model, baseline in (("gipo_policy", "ppo_policy"), ("ppo_policy", "gipo_policy")):
        view = replace(given, model=model, baselines=[baseline])
        orders = pairs_in_both_orders(view)
        votes = zip(orders, judge.judge(list(orders.values()), lambda _: None), strict=True)
        found = {order: verdict for order, verdict in votes if verdict is not None}
        made = comparisons_from_verdicts(view, found, sampled=True)
        assert not any(c.flipped for c in made)
        outcomes.append([c.outcome for c in made])
    # shared pairs: one vote each way
    assert sorted(outcomes[0]) == ["lose"] * 3 + ["tie"] * 3 + ["win"] * 3
    mirrored = {"win": "lose", "lose": "win", "tie": "tie"}
    assert outcomes[1] == [mirrored[outcome] for outcome in outcomes[0]]
    # ann prefers the model on all three, bob on none: each is constant, chance agreement 0, kappa 0
    found = agreement(ratings.votes)
    assert found["shared"] == 3 and found["raw"] == 0.0 and found["cohen"] == {"ann, bob": 0.0}


def test_the_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lookup("judge", "human") is HumanJudge
    given = [*pairs(12), Pair("hh", "helpful", "same", "q", "x", "x")]
    judge = HumanJudge(raters=3, pairs=4, overlap=1.0, directory=tmp_path)
    assert judge.prepare(given) is False and "judge.ratings=" in capsys.readouterr().out
    pages = sorted(judge.folder.glob("*.html"))
    assert [page.name for page in pages] == ["rater_1.html", "rater_2.html", "rater_3.html"]
    judge.ratings = [
        str(export(p, prefer, tmp_path))
        for p, prefer in zip(pages, (MINE, MINE, THEIRS), strict=True)
    ]
    assert judge.prepare(given) is True
    done: list[int] = []
    swapped_pairs = [replace(p, first=p.second, second=p.first) for p in given[:12]]
    found = judge.judge([*given[:12], *swapped_pairs, given[12]], done.append)
    assert sum(done) == 25 and found.count(None) == 16
    choices = [verdict and verdict.choice for verdict in found]
    # two of three votes
    assert choices[:12].count(FIRST) == 4 and choices[12:24].count(SECOND) == 4
    assert choices[-1] == TIE
    one = found[choices.index(FIRST)]
    assert one is not None and one.text == "rater_1: first, rater_2: first, rater_3: second"
    about = judge.about()
    assert (
        about["agreement"]["shared"] == 4
        and about["progress"]["rater_1"] == [4, 4]
        and "no order is swapped" in about["notes"][0]
        and str(tmp_path) not in json.dumps(about)
    )
    with pytest.raises(UserError, match="no raters"):
        HumanJudge(raters=0)


def test_kappas() -> None:
    a = ["first", "first", "tie", "second", "first", "tie", "second", "second", "first", "first"]
    b = ["first", "tie", "tie", "second", "second", "tie", "second", "first", "first", "first"]
    assert cohen_kappa(list(zip(a, b, strict=True))) == pytest.approx(cohen_kappa_score(a, b))
    assert (
        cohen_kappa([]) is None
        and cohen_kappa([("tie", "tie")] * 3) is None
        and cohen_kappa([("a", "a"), ("b", "b")]) == 1.0
    )
    # Fleiss (1971), by hand: rows 3-0, 2-1, 1-2 of two categories: P = (1 + 1/3 + 1/3) / 3, P_e =
    # (6/9)^2 + (3/9)^2
    rows = [["a", "a", "a"], ["a", "a", "b"], ["a", "b", "b"]]
    assert fleiss_kappa(rows) == pytest.approx((5 / 9 - 5 / 9) / (1 - 5 / 9))
    assert (
        fleiss_kappa([["a", "a"], ["b", "b"]]) == 1.0
        and fleiss_kappa([]) is None
        and fleiss_kappa([["a", "a"]]) is None
    )
    found = agreement(
        {
            "1": {"x": "first", "y": "first", "z": "tie"},
            "2": {"x": "tie", "y": "tie"},
            "3": {"x": "first"},
        }
    )
    assert (
        found["shared"] == 2
        and found["raw"] == pytest.approx((1 / 3 + 1) / 2)
        and found["cohen"]["x, y"] == 1.0
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"study": "0"}, "another study"),
        ({"rater": "eve"}, "another study"),
        ({"format": "x"}, "not a file of ratings"),
        ({"ratings": "x"}, "no list of ratings"),
        ({"ratings": [{"pair": "x", "choice": "left"}]}, "not a rating"),
        ({"ratings": [7]}, "not a rating"),
    ],
)
def test_what_is_no_export(tmp_path: Path, change: dict, what: str) -> None:
    pages = write_pages(tmp_path, pairs(4), ["ann"], 4, 0.0, 0)
    file = export(pages[0], "", tmp_path)
    assert len(import_ratings([file], pages[0].parent / "key.json").votes) == 4
    with pytest.raises(UserError, match="occurs twice"):
        import_ratings([file, file], pages[0].parent / "key.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=what):
        import_ratings([file], pages[0].parent / "key.json")
    file.write_text("{")
    with pytest.raises(UserError, match="cannot read ratings"):
        import_ratings([file], pages[0].parent / "key.json")


def test_names_that_name_no_file(tmp_path: Path) -> None:
    for names in (["../x"], [""], [".a"], ["a/b"], ["Ann", "ann"]):
        with pytest.raises(UserError):
            write_pages(tmp_path, pairs(4), names, 1, 0.0, 0)
    assert list(tmp_path.iterdir()) == []
