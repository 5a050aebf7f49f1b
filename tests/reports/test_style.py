from __future__ import annotations

import matplotlib

from gipo_megatron.reports.style import (
    COLOURS,
    COLUMN,
    MARKERS,
    PAGE,
    colour,
    dash,
    marker,
    panels,
    shared_legend,
    style,
    visible,
)


def test_style_ends_with_its_block() -> None:
    before = dict(matplotlib.rcParams)
    with style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert dict(matplotlib.rcParams) == before


def test_no_two_of_many_lines_look_alike() -> None:
    looks = {(colour(i), dash(i)) for i in range(4 * len(COLOURS))}
    assert len(looks) == 28
    assert len({marker(i) for i in range(len(COLOURS))}) == len(MARKERS) == len(COLOURS)


def test_panels_have_no_empty_axes_and_fit_a_column() -> None:
    for count in range(1, 8):
        figure, axes = panels([f"p{i}" for i in range(count)], columns=3)
        assert len(figure.axes) == len(axes) == count and figure.get_figwidth() == (
            COLUMN if count == 1 else PAGE
        )
        assert [a.get_title(loc="left") or a.get_title() for a in axes] == [
            f"p{i}" for i in range(count)
        ]


def test_legend_has_each_label_once() -> None:
    figure, axes = panels(["a", "b"])
    for axis in axes:
        axis.plot([0, 1], label="one")
    shared_legend(figure, axes)
    assert figure.legends == []
    shared_legend(figure, axes, at_least=1)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["one"]
    assert visible("_x") == " _x" and visible("x") == "x"
