"""The names at the ends of lines: they do not overlap, and the legend has them no more."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text

from bench.report.figures import canvas
from bench.report.figures.line_ends import spread
from bench.report.figures.lines import line_of
from bench.report.figures.style import Style

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("count", "panels"), [(2, 1), (11, 1), (14, 4)])
def test_each_line_has_its_name_at_its_end(count: int, panels: int) -> None:
    """All lines but one end at nearly the same height; one ends earlier than the others."""
    with canvas.look():
        figure, axes = canvas.panels(panels)
        names = [f"variant_{number}" for number in range(count)]
        ends = dict(zip(names, 100 + 0.01 * RNG.permutation(count), strict=True))
        style = Style("#000000", "o", "full")
        for axis in axes:
            for name, end in ends.items():
                line = line_of(style, label=name)
                line.set_data(*([1, 2, 4], [1, 2, end]) if name != names[0] else ([1, 2], [1, 50]))
                axis.add_line(line)
            axis.set(xscale="log", xlim=(0.8, 5), ylim=(0, 110))
        handles = [*(line_of(style, label=name) for name in names), Line2D([], [], label="predicted")]
        canvas.dress(figure, "Title", "setting", "footer " * 40, handles)
        figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["predicted"]
    for axis in axes:
        notes = [text for text in axis.texts if isinstance(text, Annotation)]
        assert {note.get_text() for note in notes} == set(names)
        notes.sort(key=lambda note: note.get_position()[1])
        in_order = [note.get_text() for note in notes if note.get_text() != names[0]]
        assert in_order == sorted(names[1:], key=lambda name: ends[name])
        boxes = [Text.get_window_extent(note) for note in notes]  # without the leader
        assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
        assert all(axis.bbox.x1 < box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    _title, footer = sorted(figure.texts, key=lambda text: -text.get_window_extent().y0)
    words = [line for line in footer.get_text().split("\n") if line]
    assert legend.get_window_extent().y0 >= len(words) * footer.get_fontsize() * figure.dpi / 72


@pytest.mark.parametrize("room", [100.0, 30.0])
def test_names_move_no_further_than_they_must(room: float) -> None:
    """Against a search over all ways to keep the order, by small steps, for three names."""
    grid = np.arange(0.0, room + 0.5)
    for _ in range(20):
        places = RNG.uniform(0, room, 3)
        found = spread(places, 12.0, 0.0, room)
        ordered = np.sort(places)
        a, b, c = np.meshgrid(grid, grid, grid, indexing="ij")
        allowed = (b - a >= 12) & (c - b >= 12)
        cost = (a - ordered[0]) ** 2 + (b - ordered[1]) ** 2 + (c - ordered[2]) ** 2
        best = cost[allowed].min()
        assert (np.diff(np.sort(found)) >= 12 - 1e-9).all()
        assert (np.argsort(found) == np.argsort(places)).all()
        assert ((found >= 0) & (found <= room)).all()
        assert ((np.sort(found) - ordered) ** 2).sum() <= best + 1e-9
