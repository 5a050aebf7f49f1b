from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gipo_megatron.evaluation.results import (
    build_results,
    comparisons_from_verdicts,
    incomplete,
    pairs_in_both_orders,
    write_results,
)
from gipo_megatron.evaluation.tables import latex_table, markdown_table
from gipo_megatron.evaluation.types import FIRST, SECOND, PairOrder, Response, Verdict
from tests.evaluation.simulated import head_to_head, prompts, verdicts

TASKS = ("hh", "tl;dr_|x|")


@pytest.fixture(scope="module")
def evaluation() -> dict:
    baselines, asked = ["ppo", "s_f|t%"], prompts(20, TASKS)
    given = head_to_head("gipo", baselines, asked)
    comparisons = comparisons_from_verdicts(given, verdicts(baselines, asked, 0))
    about = {"name": "rule", "model": "gpt_4 & co"}
    return build_results(given, comparisons, about, bootstrap=200, seed=0)


def test_pairs_in_both_orders() -> None:
    asked = prompts(2)
    given = head_to_head("gipo", ["ppo"], asked)
    del given.responses["ppo"][1].figures["score"]
    pairs = pairs_in_both_orders(given)
    mine, theirs = given.responses["gipo"], given.responses["ppo"]
    assert list(pairs) == [
        ("hh", "ppo", p.prompt_id, first) for p in asked for first in (True, False)
    ]
    one, other = pairs["hh", "ppo", "hh-000", True], pairs["hh", "ppo", "hh-000", False]
    assert (one.first, one.second) == (other.second, other.first) == (mine[0].text, theirs[0].text)
    assert one.extras == {"first_score": 0.0, "second_score": 0.0}
    assert pairs["hh", "ppo", "hh-001", False].extras == {"second_score": 0.1}


def test_comparisons() -> None:
    asked = prompts(2)
    given = head_to_head("gipo", ["ppo"], asked)
    given.responses["gipo"][0] = Response("gipo", "hh", "hh-000", "x", 3, True, {"p_high": 0.5})
    given.responses["ppo"][0] = Response("ppo", "hh", "hh-000", "y", 4, True, {"p_high": 1.0})
    given.responses["sft"] = [Response("sft", "hh", p.prompt_id, "z", 1, True) for p in asked]
    found = {
        PairOrder("hh", "ppo", p.prompt_id, first): Verdict(FIRST if first else SECOND)
        for p in asked
        for first in (True, False)
    }
    made = comparisons_from_verdicts(given, found)
    assert [(c.prompt_id, c.outcome, c.source) for c in made] == [
        ("hh-000", "win", "source_0"),
        ("hh-001", "win", "source_1"),
    ]
    assert (made[0].model_tokens, made[0].baseline_tokens, made[0].p_high) == (3, 4, 0.75)
    back = comparisons_from_verdicts(
        replace(given, model="ppo", baselines=["gipo"]),
        {PairOrder("hh", "gipo", k.prompt_id, not k.model_first): v for k, v in found.items()},
    )
    # the group is that of the prompt, for any pair of policies
    assert [c.outcome for c in back] == ["lose", "lose"] and back[0].p_high == 0.75
    assert comparisons_from_verdicts(replace(given, model="sft", baselines=[]), {}) == []


def test_what_is_missing_is_no_result() -> None:
    asked = prompts(2)
    given, found = head_to_head("gipo", ["ppo"], asked), verdicts(["ppo"], asked, 1)
    del found[PairOrder("hh", "ppo", "hh-001", False)]
    with pytest.raises(
        ValueError, match="hh/hh-001: gipo against ppo is not judged in both orders"
    ):
        comparisons_from_verdicts(given, found)
    with pytest.raises(ValueError, match="not judged in both"):
        comparisons_from_verdicts(given, found, sampled=True)
    del found[PairOrder("hh", "ppo", "hh-001", True)]
    assert len(comparisons_from_verdicts(given, found, sampled=True)) == 1
    del given.responses["ppo"][0]
    with pytest.raises(ValueError, match="no response of ppo"):
        comparisons_from_verdicts(given, verdicts(["ppo"], asked, 1))


def test_results(evaluation: dict, tmp_path: Path) -> None:
    cells = 0
    for by_baseline in evaluation["tasks"].values():
        for cell in by_baseline.values():
            assert (
                cell["win"] + cell["tie"] + cell["lose"] == cell["n"]
                and cell["n"] + cell["failed"] == 20
            )
            assert set(cell["by_source"]) == {"source_0", "source_1"} and set(cell["by_group"]) == {
                "high",
                "low",
            }
            assert set(cell["ci95"]) == {"win", "tie", "lose"} and len(cell["ci95"]["win"]) == 2
            cells += 1
    assert cells == 4
    row = evaluation["policies"]["gipo"]["hh"]
    assert (
        row["n"] == 20
        and row["score"] == pytest.approx(0.95)
        and row["kl"] == 0.5
        and row["finished"] == 0.8
    )
    path = tmp_path / "deep/results.json"
    write_results(path, evaluation)
    # tasks at the top
    written = {
        **evaluation["tasks"],
        **{name: value for name, value in evaluation.items() if name != "tasks"},
    }
    assert json.loads(path.read_text()) == written and [p.name for p in path.parent.iterdir()] == [
        "results.json"
    ]
    with pytest.raises(ValueError):
        write_results(path, evaluation | {"judge": {"x": float("nan")}})
    assert json.loads(path.read_text()) == written


def test_what_is_incomplete() -> None:
    """More than half of a cell's prompts failed; half did not. Without any judged prompt, all."""

    def tasks(*cells: tuple[int, int]) -> dict:
        return {f"t{i}": {"ppo": {"n": n, "failed": f}} for i, (n, f) in enumerate(cells)}

    assert incomplete(tasks((5, 5), (4, 5), (0, 0))) == ["t1 against ppo: 4 of 9 prompts judged"]
    assert incomplete(tasks((10, 0), (0, 1))) == ["t1 against ppo: 0 of 1 prompts judged"]
    assert len(incomplete(tasks((0, 0), (0, 0)))) == 2
    marked = small() | {"incomplete": ["tl_dr against ppo: 4 of 9 prompts judged"]}
    assert "\n\nIncomplete: tl\\_dr against ppo: 4 of 9" in markdown_table(marked)
    warned = small() | {"warnings": ["ppo_kl was trained against …"]}
    assert "\n\nWarning: ppo\\_kl was trained against" in markdown_table(warned)


def small() -> dict:
    def cell(win: int, tie: int, lose: int, failed: int, flipped: int) -> dict:
        n = win + tie + lose
        ci = (
            {"win": [0.5, 0.75], "tie": [0.125, 0.25], "lose": [0.0, 0.1]}
            if n
            else dict.fromkeys(("win", "tie", "lose"))
        )
        return {
            "win": win,
            "tie": tie,
            "lose": lose,
            "failed": failed,
            "flipped": flipped,
            "n": n,
            "ci95": ci,
        }

    tasks = {"tl_dr": {"ppo|kl": cell(5, 2, 1, 2, 1)}, "a&b": {"ppo|kl": cell(0, 0, 0, 3, 0)}}
    about = {"judge": {"name": "rule<1>"}, "incomplete": [], "warnings": []}
    return {"subject": "gipo*", **about, "tasks": tasks}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown() -> None:
    lines = markdown_table(small()).splitlines()
    assert lines[0].startswith("**gipo\\***") and len(lines) == 5
    head = ["judge", "baseline"]
    for task in ("tl\\_dr", "a\\&b"):
        head += [f"{task}: {outcome} %" for outcome in ("win", "tie", "lose")]
    assert cells(lines[2]) == [*head, "failed", "flipped"]
    assert re.fullmatch(r"(\|:-+){2}(\|-+:){8}\|", lines[3])
    shares = ["62.5 [50.0, 75.0]", "25.0 [12.5, 25.0]", "12.5 [0.0, 10.0]", "–", "–", "–"]
    assert cells(lines[4]) == ["rule\\<1\\>", "ppo\\|kl", *shares, "5 of 13", "1 of 8"]


def test_latex() -> None:
    lines = latex_table(small()).splitlines()
    assert lines[1] == r"\begin{tabular}{llrrrrrrrr}" and lines[-1] == r"\end{tabular}"
    assert (
        lines[3]
        == r"Judge & Baseline & \multicolumn{3}{c}{tl\_dr} & \multicolumn{3}{c}{a\&b} & Failed &"
        r" Flipped \\"
    )
    assert lines[4] == r"\cmidrule(lr){3-5} \cmidrule(lr){6-8}"
    assert (
        lines[7]
        == r"rule\textless{}1\textgreater{} & ppo\textbar{}kl & 62.5 & 25.0 & 12.5 & -- & -- & -- &"
        r" 5 & 1 \\"
    )
    small_print = r"{\tiny [50.0, 75.0]} & {\tiny [12.5, 25.0]} & {\tiny [0.0, 10.0]}"
    assert lines[8] == rf" &  & {small_print} &  &  &  &  &  \\"


def test_tables_without_a_baseline() -> None:
    about = {"judge": {"name": "rule"}, "incomplete": [], "warnings": []}
    empty = {"subject": "a", **about, "tasks": {"t": {}}}
    assert len(markdown_table(empty).splitlines()) == 4
    assert latex_table(empty).splitlines()[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_every_row_has_every_column(evaluation: dict) -> None:
    rows = [
        line
        for line in latex_table(evaluation).splitlines()
        if line.endswith(r"\\") and "multicolumn" not in line
    ]
    assert len(rows) == 5 and {line.replace(r"\&", "").count("&") for line in rows} == {9}
    lines = markdown_table(evaluation).splitlines()[2:]
    assert len(lines) == 4 and {line.replace("\\|", "").count("|") for line in lines} == {11}
