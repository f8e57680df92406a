"""Figures can be read: titles keep clear of the legend, texts of ticks of each other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.lines import Line2D

from bench.report.figures import canvas
from bench.report.figures.dots import row_panels
from bench.report.text import units


def test_a_title_keeps_clear_of_the_legend() -> None:
    with canvas.look():
        figure, _ = canvas.panels(1)
        title = "Peak memory of a training step against sequence length"
        canvas.dress(figure, title, "setting", "footer", [Line2D([], [], label="compressive (mem_len=256)")])
        figure.draw_without_rendering()
        heading = next(text for text in figure.texts if text.get_text().startswith("Peak"))
        assert heading.get_text().split() == [*title.split(), "setting"]
        assert heading.get_window_extent().x1 < figure.legends[0].get_window_extent().x0


@pytest.mark.parametrize("fixed", [False, True])
def test_texts_of_ticks_do_not_run_together(tmp_path: Path, fixed: bool) -> None:
    """The last tick stays, and each keeps its own text."""
    places = [5e9, 6e9, 7e9, 8e9, 9e9]
    with canvas.look():
        figure, (axis, *_) = canvas.panels(3, width=1.6)
        axis.set_xlim(4e9, 9.5e9)
        if fixed:
            axis.set_xticks(places, [units.flops(place, short=True) for place in places])
        else:
            canvas.human_axis(
                axis.xaxis, 4e9, 9.5e9, lambda at: units.flops(at, short=True), binary=False, most=9
            )
            axis.xaxis.set_ticks(places)
        canvas.dress(figure, "Title", "setting", "footer", [])
        canvas.save(figure, tmp_path, "x")
        labels = axis.get_xticklabels()
        boxes = [label.get_window_extent() for label in labels]
    assert 1 < len(labels) < len(places)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert labels[-1].get_text() == "9 GFLOP"
    for label in labels:
        assert label.get_text() == units.flops(label.get_position()[0], short=True)


def test_an_axis_from_right_to_left_keeps_its_ticks(tmp_path: Path) -> None:
    with canvas.look():
        figure, (axis,) = canvas.panels(1)
        axis.set_xticks([1, 5, 10, 15, 20])
        axis.set_xlim(20.9, 0.1)
        canvas.dress(figure, "Title", "setting", "footer", [])
        canvas.save(figure, tmp_path, "x")
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "5", "10", "15", "20"]


def test_long_names_of_rows_leave_the_data_their_room() -> None:
    widths = []
    for name in ("dense", "3×longformer (window=64) + gated_delta_net + dense · 1k · rate 0.003"):
        with canvas.look():
            figure, (axis,) = row_panels(["depth 4"], [name, "chunked"])
            canvas.dress(figure, "Title", "setting", "footer", [])
            figure.draw_without_rendering()
            widths.append(axis.get_window_extent().width / figure.dpi)
            assert axis.get_yticklabels()[0].get_window_extent().x0 >= 0
    assert min(widths) > 2
