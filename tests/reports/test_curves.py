from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gipo_megatron.reports.curves import MAX_SOURCES
from gipo_megatron.reports.figures import FIGURES, draw
from gipo_megatron.reports.run_report import CAPTIONS
from gipo_megatron.reports.runs import load_run
from gipo_megatron.reports.style import style
from tests.reports.synthetic import ppo_run, sft_run, with_gold, write_rows


def titles(figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def legend(figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def test_lines_are_the_runs_numbers(tmp_path: Path) -> None:
    run = load_run(ppo_run(tmp_path / "gipo", steps=15))
    figures = draw([run])
    high, low, gap, _ = figures.drawn["group_returns"].axes[0].lines
    assert list(high.get_ydata()) == run.series("groups/return_high")[1]
    assert list(low.get_ydata()) == run.series("groups/return_low")[1]
    assert list(gap.get_ydata()) == run.series("groups/gap")[1]
    assert legend(figures.drawn["group_returns"]) == ["high group", "low group", "gap"]
    assert legend(figures.drawn["sources"]) == ["harmless", "helpful"]
    assert legend(figures.drawn["kl"]) == []  # one line needs no legend


def test_stages_without_rollouts(tmp_path: Path) -> None:
    figures = draw([load_run(sft_run(tmp_path / "sft"))])
    assert list(figures.drawn) == ["loss"] and len(figures.missing) == len(FIGURES) - 1
    write_rows(
        tmp_path / "sft/metrics.jsonl",
        [
            {"step": s, "rm/loss": 1.0 / s, "rm/accuracy": None, "eval/accuracy": 0.8}
            for s in (1, 2)
        ],
    )
    figures = draw([load_run(tmp_path / "sft")])
    assert [a.get_title(loc="left") for a in figures.drawn["accuracy"].axes] == [
        "accuracy, held-out pairs"
    ]


def test_source_names_may_have_slashes(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "metrics.jsonl",
        [{"step": 1, "source/hh/harmless/score": 1.0, "source/hh/helpful/score": 2.0}],
    )
    assert legend(draw([load_run(tmp_path)]).drawn["sources"]) == ["hh/harmless", "hh/helpful"]
    write_rows(
        tmp_path / "metrics.jsonl",
        [{"step": 1, "eval/gold": 0.0, "eval/gold/easy": 1.0, "eval/gold/hard": 2.0}],
    )
    figure = draw([load_run(tmp_path)]).drawn["gold_by_source"]
    assert titles(figure) == ["easy prompts", "hard prompts", "all prompts"]


def test_learned_groups_are_drawn_per_run_and_sources_between_runs(tmp_path: Path) -> None:
    """The groups of two runs are those of two classifiers; the prompts of a source are the same."""
    runs = [
        load_run(ppo_run(tmp_path / name, beta=beta))
        for name, beta in (("ppo", 0.0), ("gipo", 0.3))
    ]
    figures = draw(runs).drawn
    per_run, between = figures["group_returns"], figures["sources"]
    assert titles(per_run) == ["ppo", "gipo"] and legend(per_run) == [
        "high group",
        "low group",
        "gap",
    ]
    for axis, run in zip(per_run.axes, runs, strict=True):
        drawn = [list(line.get_ydata()) for line in axis.lines[:3]]
        assert drawn == [
            run.series(f"groups/{name}")[1] for name in ("return_high", "return_low", "gap")
        ]
        assert len({line.get_color() for line in axis.lines[:3]}) == 1
    assert per_run.axes[0].get_ylim() == per_run.axes[1].get_ylim()
    assert "own classifier" in CAPTIONS["group_returns"]
    assert titles(between) == ["harmless: score", "helpful: score"]
    assert legend(between) == ["ppo", "gipo"]
    learned = [
        name
        for name, figure in figures.items()
        for axis in figure.axes
        if "gap" in axis.get_title(loc="left") or "group" in axis.get_ylabel()
    ]
    assert set(learned) == {"p_high"}  # a row per run


def test_equal_curves_are_both_seen(tmp_path: Path) -> None:
    runs = [load_run(ppo_run(tmp_path / name, steps=20, recipe=False)) for name in "ab"]
    first, other = draw(runs).drawn["kl"].axes[0].lines
    assert list(first.get_ydata()) == list(other.get_ydata())
    assert first.get_linestyle() == "-" and other.get_linestyle() == "--"
    assert first.get_zorder() < other.get_zorder()


def test_gold_has_one_scale_and_its_last_values_in_figures(tmp_path: Path) -> None:
    golds = {"ppo": [0.1, 0.5, 0.5], "gipo": [0.1, 0.5, 0.65]}
    runs = [
        load_run(
            with_gold(
                ppo_run(tmp_path / name, recipe=False), {"easy": [0.2, 0.8, 0.8], "hard": gold}
            )
        )
        for name, gold in golds.items()
    ]
    figure = draw(runs).drawn["gold_by_source"]
    assert titles(figure) == ["easy prompts", "hard prompts", "all prompts"]
    assert legend(figure) == ["ppo", "gipo"] and len({a.get_ylim() for a in figure.axes}) == 1
    labels = [{text.get_text() for text in axis.texts} for axis in figure.axes]
    assert labels == [{"0.80"}, {"0.50", "0.65"}, {"0.65", "0.72"}]  # 0.725 in binary is below it
    with style():
        figure.draw_without_rendering()
    boxes = [[text.get_window_extent() for text in axis.texts] for axis in figure.axes]
    assert all(len(pair) == 2 and not pair[0].overlaps(pair[1]) for pair in boxes)
    hidden = figure.legends[0].get_window_extent()
    assert not any(
        box.overlaps(hidden) or box.x1 > figure.bbox.x1 for pair in boxes for box in pair
    )


def test_many_sources_are_named_not_dropped_silently(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "metrics.jsonl",
        [{"step": 1, **{f"source/s{i}/score": float(i) for i in range(MAX_SOURCES + 2)}}],
    )
    figure = draw([load_run(tmp_path)]).drawn["sources"]
    assert (
        len(legend(figure)) == MAX_SOURCES and figure.get_suptitle() == "2 more not shown: s8, s9"
    )


def test_a_cold_critic_does_not_flatten_the_curve(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "metrics.jsonl",
        [{"step": s, "value/explained_variance": v} for s, v in ((1, -4000.0), (2, 0.5))],
    )
    assert draw([load_run(tmp_path)]).drawn["explained_variance"].axes[0].get_ylim() == (-1.0, 1.0)


def test_a_constant_is_drawn_flat(tmp_path: Path) -> None:
    rows = [{"step": s, "kl/mean": 1.0 * s, "kl/coef_mean": 0.05 + s % 2 * 1e-9} for s in (1, 2, 3)]
    write_rows(tmp_path / "metrics.jsonl", rows)
    low, high = draw([load_run(tmp_path)]).drawn["kl"].axes[1].get_ylim()
    assert low == pytest.approx(0.045, rel=1e-3) and high == pytest.approx(0.055, rel=1e-3)


def with_kl(folder: Path, kl: dict[int, float | None]) -> Path:
    """Held-out KL at these steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_rows(
        folder / "metrics.jsonl",
        [row | ({"eval/kl": kl[row["step"]]} if row["step"] in kl else {}) for row in rows],
    )
    return folder


def test_frontier_is_held_out_reward_against_the_root_of_kl(tmp_path: Path) -> None:
    run = load_run(
        with_kl(ppo_run(tmp_path / "gipo", steps=40), {10: 4.0, 20: 9.0, 30: None, 40: -0.01})
    )
    figure = draw([run]).drawn["frontier"]
    score, gold = figure.axes
    steps, scores = run.series("eval/score")
    assert steps == [10, 20, 30, 40]
    path, end = score.lines
    # in order of the steps; a sampled KL below 0 is 0
    assert list(path.get_xdata()) == [2.0, 3.0, 0.0]
    assert list(path.get_ydata()) == [scores[0], scores[1], scores[3]]
    assert (list(end.get_xdata()), list(end.get_ydata())) == ([0.0], [scores[3]])
    assert list(gold.lines[0].get_ydata()) == [run.series("eval/gold")[1][i] for i in (0, 1, 3)]
    assert score.get_title(loc="left") == "score, held-out prompts" and legend(figure) == []


def test_frontier_of_seeds_is_their_mean_and_themselves(tmp_path: Path) -> None:
    dirs = [
        with_kl(ppo_run(tmp_path / f"gipo_seed{s}", seed=s), {10: 1.0 + 3 * s, 20: 9.0})
        for s in range(2)
    ]
    dirs.append(with_kl(ppo_run(tmp_path / "ppo", beta=0.0), {10: 1.0}))
    runs = [load_run(d) for d in dirs]
    figure = draw(runs).drawn["frontier"]
    lines = figure.axes[0].lines
    assert len(lines) == 4 + 2 and legend(figure) == ["gipo (2 seeds)", "ppo"]
    scores = [run.series("eval/score")[1][:2] for run in runs]
    assert list(lines[0].get_xdata()) == [1.5, 3.0]  # the mean of √1 and √4, then √9
    assert list(lines[0].get_ydata()) == [
        pytest.approx((a + b) / 2) for a, b in zip(scores[0], scores[1], strict=True)
    ]
    assert [list(line.get_ydata()) for line in lines[2:4]] == scores[:2]
    assert (
        lines[0].get_marker() != lines[4].get_marker()
        and lines[0].get_color() != lines[4].get_color()
    )


def test_frontier_of_training_prompts_only_without_held_out_ones(tmp_path: Path) -> None:
    run = load_run(ppo_run(tmp_path / "gipo", steps=12))
    (axis,) = draw([run]).drawn["frontier"].axes
    assert axis.get_title(loc="left") == "score, training prompts"
    assert list(axis.lines[0].get_xdata()) == [math.sqrt(kl) for kl in run.series("kl/mean")[1]]
    assert "no eval/kl" in draw([load_run(sft_run(tmp_path / "sft"))]).missing["frontier"]
