from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
from matplotlib.text import Text

from gipo_megatron.errors import UserError
from gipo_megatron.reports.figures import FIGURES, draw, rendered, write_figures
from gipo_megatron.reports.runs import load_run
from gipo_megatron.reports.style import COLUMN, PAGE, SMALLEST, style
from tests.reports.synthetic import ppo_run, sft_run, write_rows


def legend(figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def test_all_figures_of_two_systems_with_seeds(tmp_path: Path) -> None:
    dirs = [ppo_run(tmp_path / f"gipo_seed{s}", seed=s, steps=20) for s in range(2)]
    dirs += [ppo_run(tmp_path / f"ppo_seed{s}", seed=s, beta=0.0, steps=20) for s in range(2)]
    figures = draw([load_run(d) for d in dirs])
    assert (
        set(figures.drawn)
        == set(FIGURES) - {"accuracy", "gold_by_source"}
        == set(FIGURES) - set(figures.missing)
    )
    assert "<name>/accuracy" in figures.missing["accuracy"]
    for name in ("reward", "kl", "sources", "explained_variance"):
        assert legend(figures.drawn[name]) == ["gipo (2 seeds)", "ppo (2 seeds)"], name
    titles = [axis.get_title(loc="left") for axis in figures.drawn["reward"].axes]
    assert titles == [
        "score, training prompts",
        "score, held-out prompts",
        "gold reward, held-out prompts",
    ]
    held_out = figures.drawn["reward"].axes[1]
    assert [list(line.get_xdata()) for line in held_out.lines] == [[10, 20], [10, 20]]
    assert len(held_out.collections) == 2  # a band for each system


def test_nulls_only_and_no_rows_draw_nothing(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "metrics.jsonl",
        [{"step": 1, "reward/score_mean": None, "weights/min": None, "source/a/score": None}],
    )
    write_rows(
        tmp_path / "samples.jsonl",
        [{"step": 1, "prompt": "p", "response": "r", "score": None, "p_high": 0.5, "length": 3}],
    )
    assert draw([load_run(tmp_path)]).drawn == {}
    write_rows(tmp_path / "metrics.jsonl", [])
    assert draw([load_run(tmp_path)]).drawn == {}


def test_one_step_and_names_that_matplotlib_would_read(tmp_path: Path) -> None:
    dirs = [
        ppo_run(tmp_path / name, steps=1, recipe=False, seed=i)
        for i, name in enumerate(("_$x", "a$b$"))
    ]
    figures = draw([load_run(d) for d in dirs])
    assert len(figures.drawn) > 5 and legend(figures.drawn["kl"]) == [" _$x", "a$b$"]
    for name in ("kl", "weights"):  # the two places where names go
        rendered(figures.drawn[name], "png")


def test_files_are_reproducible_and_nothing_global_changes(tmp_path: Path) -> None:
    folder = ppo_run(tmp_path / "gipo", steps=5)
    before = dict(matplotlib.rcParams)
    for kind in ("png", "svg", "pdf"):
        one, two = (rendered(draw([load_run(folder)]).drawn["p_high"], kind) for _ in range(2))
        assert one == two and len(one) > 1000, kind
    assert dict(matplotlib.rcParams) == before


def test_written_files_are_those_drawn(tmp_path: Path) -> None:
    written, missing = write_figures([sft_run(tmp_path / "sft")], tmp_path / "out")
    assert [p.name for p in written] == ["loss.png", "loss.svg", "loss.pdf"] and len(
        missing
    ) == len(FIGURES) - 1
    assert [p.read_bytes()[:4] for p in written] == [b"\x89PNG", b"<?xm", b"%PDF"]


def test_every_word_is_readable_in_a_column(tmp_path: Path) -> None:
    """A figure is as wide as it is printed, one column or two, and no text in it is below 7
    points."""
    dirs = [
        ppo_run(tmp_path / f"{name}_seed{s}", seed=s, beta=beta)
        for name, beta in (("gipo", 0.3), ("ppo", 0.0))
        for s in range(2)
    ]
    sizes = []
    for runs in (dirs[:1], dirs):
        for figure in draw([load_run(d) for d in runs]).drawn.values():
            assert (
                figure.get_figwidth() == (COLUMN if len(figure.axes) == 1 else PAGE)
                and PAGE <= 2 * COLUMN + 0.2
            )
            with style():
                figure.draw_without_rendering()
            sizes += [
                text.get_fontsize()
                for text in figure.findobj(Text)
                if text.get_text() and text.get_visible()
            ]
    assert len(sizes) > 400 and min(sizes) >= SMALLEST == 7


def test_a_missing_folder_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_figures([tmp_path / "nope"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
