from __future__ import annotations

import json
from pathlib import Path

import pytest

from gipo_megatron.evaluation.results import build_results, duels_from_verdicts, write_results
from gipo_megatron.evaluation.tables import latex_table, markdown_table
from gipo_megatron.evaluation.types import FIRST, SECOND, Response, Verdict
from tests.evaluation.simulated import answers, prompts, verdicts

TASKS = ("hh", "tl;dr_|x|")


@pytest.fixture(scope="module")
def evaluation() -> dict:
    asked = prompts(20, TASKS)
    responses = {name: answers(name, asked) for name in ("gipo", "ppo", "s_f|t%")}
    duels = duels_from_verdicts(
        "gipo", ["ppo", "s_f|t%"], asked, responses, verdicts(["ppo", "s_f|t%"], asked, 0)
    )
    about = {"name": "rule", "model": "gpt_4 & co"}
    return build_results(
        "gipo", ["ppo", "s_f|t%"], asked, responses, duels, about, bootstrap=200, seed=0
    )


def test_duels() -> None:
    asked = prompts(2)
    responses = {name: answers(name, asked) for name in ("gipo", "ppo")}
    responses["gipo"][0] = Response("gipo", "hh", "hh-000", "x", 3, True, {"p_high": 0.5})
    responses["ppo"][0] = Response("ppo", "hh", "hh-000", "y", 4, True, {"p_high": 1.0})
    responses["sft"] = [Response("sft", "hh", p.prompt_id, "z", 1, True) for p in asked]
    said = {
        ("hh", "ppo", p.prompt_id, first): Verdict(FIRST if first else SECOND)
        for p in asked
        for first in (True, False)
    }
    made = duels_from_verdicts("gipo", ["ppo"], asked, responses, said)
    assert [(d.prompt_id, d.outcome, d.source) for d in made] == [
        ("hh-000", "win", "source_0"),
        ("hh-001", "win", "source_1"),
    ]
    assert (made[0].subject_tokens, made[0].opponent_tokens, made[0].p_high) == (3, 4, 0.75)
    back = duels_from_verdicts(
        "ppo",
        ["gipo"],
        asked,
        responses,
        {("hh", "gipo", k[2], not k[3]): v for k, v in said.items()},
    )
    # the group is the prompt's, whoever is compared
    assert [d.outcome for d in back] == ["lose", "lose"] and back[0].p_high == 0.75
    none = duels_from_verdicts("sft", [], asked, responses, {})
    assert none == []


def test_what_is_missing_is_no_result() -> None:
    asked = prompts(2)
    responses = {name: answers(name, asked) for name in ("gipo", "ppo")}
    said = verdicts(["ppo"], asked, 1)
    del said["hh", "ppo", "hh-001", False]
    with pytest.raises(
        ValueError, match="hh/hh-001: gipo against ppo is not judged in both orders"
    ):
        duels_from_verdicts("gipo", ["ppo"], asked, responses, said)
    with pytest.raises(ValueError, match="not judged in both"):
        duels_from_verdicts("gipo", ["ppo"], asked, responses, said, sampled=True)
    del said["hh", "ppo", "hh-001", True]
    assert len(duels_from_verdicts("gipo", ["ppo"], asked, responses, said, sampled=True)) == 1
    del responses["ppo"][0]
    with pytest.raises(ValueError, match="no response of ppo"):
        duels_from_verdicts("gipo", ["ppo"], asked, responses, verdicts(["ppo"], asked, 1))


def test_results(evaluation: dict, tmp_path: Path) -> None:
    cells = 0
    for opponents in evaluation["tasks"].values():
        for cell in opponents.values():
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
    return {"subject": "gipo*", "judge": {"name": "rule<1>"}, "tasks": tasks}


def test_markdown() -> None:
    lines = markdown_table(small()).splitlines()
    assert lines[0].startswith("**gipo\\***")
    assert lines[2].startswith(
        "| judge | opponent | tl\\_dr: win % | tl\\_dr: tie % | tl\\_dr: lose % | a\\&b: win % |"
    )
    assert lines[3].count("---") == 10
    wanted = (
        "| rule\\<1\\> | ppo\\|kl | 62.5 [50.0, 75.0] | 25.0 [12.5, 25.0] | 12.5 [0.0, 10.0] | – |"
        " – | – | 5 of 13 | 1 of 8 |"
    )
    assert lines[4] == wanted and len(lines) == 5


def test_latex() -> None:
    lines = latex_table(small()).splitlines()
    assert lines[1] == r"\begin{tabular}{llrrrrrrrr}" and lines[-1] == r"\end{tabular}"
    assert (
        lines[3]
        == r"Judge & Opponent & \multicolumn{3}{c}{tl\_dr} & \multicolumn{3}{c}{a\&b} & Failed &"
        r" Flipped \\"
    )
    assert lines[4] == r"\cmidrule(lr){3-5} \cmidrule(lr){6-8}"
    assert (
        lines[7]
        == r"rule\textless{}1\textgreater{} & ppo\textbar{}kl & 62.5 & 25.0 & 12.5 & -- & -- & -- &"
        r" 5 & 1 \\"
    )
    assert (
        lines[8]
        == r" &  & {\tiny [50.0, 75.0]} & {\tiny [12.5, 25.0]} & {\tiny [0.0, 10.0]} &  &  &  & "
        r" &  \\"
    )


def test_every_row_has_every_column(evaluation: dict) -> None:
    rows = [
        line
        for line in latex_table(evaluation).splitlines()
        if line.endswith(r"\\") and "multicolumn" not in line
    ]
    assert len(rows) == 5 and {line.replace(r"\&", "").count("&") for line in rows} == {9}
    lines = markdown_table(evaluation).splitlines()[2:]
    assert len(lines) == 4 and {line.replace("\\|", "").count("|") for line in lines} == {11}
