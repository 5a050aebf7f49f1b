from __future__ import annotations

from pathlib import Path

from gipo_megatron.telemetry.curves import MAX_SOURCES
from gipo_megatron.telemetry.figures import FIGURES, draw
from gipo_megatron.telemetry.runs import load_run
from tests.telemetry.synthetic import ppo_run, sft_run, write_rows


def legend(figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def test_lines_are_the_runs_numbers(tmp_path: Path) -> None:
    run = load_run(ppo_run(tmp_path / "gipo", steps=15))
    figures = draw([run])
    high, low = figures.drawn["group_returns"].axes[0].lines
    assert list(high.get_ydata()) == run.series("groups/return_high")[1]
    assert list(low.get_ydata()) == run.series("groups/return_low")[1]
    assert legend(figures.drawn["group_returns"]) == ["gipo, high group", "gipo, low group"]
    assert legend(figures.drawn["sources"]) == ["harmless", "helpful"]
    assert legend(figures.drawn["kl"]) == []  # one line: the title says it all


def test_stages_without_rollouts(tmp_path: Path) -> None:
    figures = draw([load_run(sft_run(tmp_path / "sft"))])
    assert list(figures.drawn) == ["loss"] and len(figures.missing) == len(FIGURES) - 1
    write_rows(tmp_path / "sft/metrics.jsonl", [{"step": s, "rm/loss": 1.0 / s, "rm/accuracy": None, "eval/accuracy": 0.8} for s in (1, 2)])
    figures = draw([load_run(tmp_path / "sft")])
    assert [a.get_title(loc="left") for a in figures.drawn["accuracy"].axes] == ["accuracy, held-out pairs"]


def test_source_names_may_have_slashes(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "source/hh/harmless/score": 1.0, "source/hh/helpful/score": 2.0}])
    assert legend(draw([load_run(tmp_path)]).drawn["sources"]) == ["hh/harmless", "hh/helpful"]
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "eval/gold": 0.0, "eval/gold/easy": 1.0, "eval/gold/hard": 2.0}])
    assert legend(draw([load_run(tmp_path)]).drawn["gold_by_source"]) == ["easy", "hard"]


def test_many_sources_are_named_not_dropped_silently(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, **{f"source/s{i}/score": float(i) for i in range(MAX_SOURCES + 2)}}])
    figure = draw([load_run(tmp_path)]).drawn["sources"]
    assert len(legend(figure)) == MAX_SOURCES and figure.get_suptitle() == "2 more not shown: s8, s9"


def test_a_cold_critic_does_not_flatten_the_curve(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", [{"step": s, "value/explained_variance": v} for s, v in ((1, -4000.0), (2, 0.5))])
    assert draw([load_run(tmp_path)]).drawn["explained_variance"].axes[0].get_ylim() == (-1.0, 1.0)
