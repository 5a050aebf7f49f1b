from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from gipo_megatron.evaluation.evaluation_figures import (
    CAPTIONS,
    draw_evaluation,
    write_evaluation_figures,
)
from gipo_megatron.evaluation.types import Response
from gipo_megatron.reports.distributions import tails
from gipo_megatron.reports.style import COLUMN, PAGE, SMALLEST, style

TASKS = ("hh", "tldr")


def cell(win: int, tie: int, lose: int) -> dict[str, Any]:
    n = win + tie + lose
    shares = {"win": win / n, "tie": tie / n, "lose": lose / n} if n else {}
    return {
        "win": win,
        "tie": tie,
        "lose": lose,
        "n": n,
        "ci95": {k: [v - 0.05, v + 0.05] for k, v in shares.items()} or None,
    }


def results(tasks: tuple[str, ...] = TASKS) -> dict[str, Any]:
    cells = {"sft": cell(12, 5, 3), "<a long name> of an $baseline$": cell(1, 9, 10)}
    return {"subject": "gipo", "tasks": dict.fromkeys(tasks, cells)}


def responses(tasks: tuple[str, ...] = TASKS) -> dict[str, list[Response]]:
    noise = np.random.Generator(np.random.PCG64(0))
    return {
        policy: [
            Response(
                policy,
                task,
                f"{i}",
                "x",
                i,
                True,
                {"score": float(noise.standard_normal() + shift), "p_high": i / 30},
            )
            for task in tasks
            for i in range(30)
        ]
        for policy, shift in (("gipo", 1.0), ("_sft", 0.0))
    }


def test_bars_are_the_shares() -> None:
    figure = draw_evaluation(results(), {})["win_tie_lose"]
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["hh", "tldr"]
    axis = figure.axes[0]
    bars = [(round(p.get_x(), 9), round(p.get_width(), 9)) for p in axis.patches]
    assert bars == [(0.0, 0.6), (0.6, 0.25), (0.85, 0.15), (0.0, 0.05), (0.05, 0.45), (0.5, 0.5)]
    whiskers = [[round(float(x), 9) for x in line.get_xdata()] for line in axis.lines]
    # losses are counted from the right
    assert whiskers == [[0.55, 0.65], [0.8, 0.9], [0.0, 0.1], [0.45, 0.55]]
    # no number where it does not fit
    assert [text.get_text() for text in axis.texts] == ["60", "25", "15", "45", "50"]
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "sft (20)",
        "<a long name> of an $… (20)",
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["win", "tie", "lose"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first baseline on top


def test_nothing_judged() -> None:
    some = {"subject": "gipo", "tasks": {"hh": {"sft": cell(0, 0, 0), "ppo": cell(1, 0, 0)}}}
    axis = draw_evaluation(some, {})["win_tie_lose"].axes[0]
    assert axis.texts[0].get_text() == "nothing judged" and len(axis.patches) == 3
    assert (
        draw_evaluation(
            {"subject": "gipo", "tasks": {"hh": {"sft": cell(0, 0, 0)}, "tldr": {}}}, {}
        )
        == {}
    )


def test_distributions_are_the_scores() -> None:
    answers = responses()
    figure = draw_evaluation(results(), answers)["score_distribution"]
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["hh", "tldr"]
    for axis, task in zip(figure.axes, TASKS, strict=True):
        scores = [[r.figures["score"] for r in rows if r.task == task] for rows in answers.values()]
        assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx(
            [np.mean(s) for s in scores]
        )
        assert [text.get_text() for text in axis.texts] == [str(tails(s)) for s in scores]
        for row, (stairs, values) in enumerate(zip(axis.patches, scores, strict=True)):
            heights, edges = row - stairs.get_data().values, stairs.get_data().edges
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            # outliers are counted, nothing is lost
            assert heights / heights.sum() == pytest.approx(counts / 30)
    answers["_sft"] = [r for r in answers["_sft"] if r.task == "hh"]
    assert "no responses" in [
        t.get_text()
        for t in draw_evaluation(results(), answers)["score_distribution"].axes[1].texts
    ]


def test_p_high_of_the_responses() -> None:
    answers = responses(("hh",))
    figure = draw_evaluation(results(), answers)["p_high"]
    assert (
        len(figure.axes) == 4
        and figure.axes[1].get_title(loc="left") == "gipo: against length, r = +1.00"
    )
    points = figure.axes[2].collections[0].get_offsets()
    assert points.tolist() == [[r.figures["score"], r.figures["p_high"]] for r in answers["_sft"]]
    bare = {name: [Response(name, "hh", "0", "x", 3, True)] for name in answers}
    assert set(draw_evaluation(results(), bare)) == {"win_tie_lose"}


@pytest.mark.parametrize("tasks", [("hh",), TASKS, ("hh", "tldr", "$ood$", "_x", "five")])
def test_files_and_sizes(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    drawn = draw_evaluation(results(tasks), responses(tasks))
    assert list(drawn) == list(CAPTIONS)
    sizes = [size for figure in drawn.values() for size in fonts(figure)]
    assert len(sizes) > 50 and min(sizes) >= SMALLEST
    assert drawn["win_tie_lose"].get_figwidth() == COLUMN and {
        f.get_figwidth() for f in drawn.values()
    } <= {COLUMN, PAGE}
    if len(tasks) == 2:
        files = write_evaluation_figures(results(tasks), responses(tasks), tmp_path / "figures")
        assert sorted(p.name for p in files) == sorted(
            f"{name}.{kind}" for name in CAPTIONS for kind in ("png", "svg", "pdf")
        )
        assert {p.suffix: p.read_bytes()[:4] for p in files} == {
            ".png": b"\x89PNG",
            ".svg": b"<?xm",
            ".pdf": b"%PDF",
        }


def fonts(figure: Figure) -> list[float]:
    with style():
        figure.draw_without_rendering()
    return [
        text.get_fontsize()
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible()
    ]
