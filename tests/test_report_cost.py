"""Plots of cost hold what the aggregated cells hold, point by point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_report import failed, record, write

from bench.report.data import statistics
from bench.report.data.collect import collect
from bench.report.figures.lines import Look
from bench.report.figures.style import styles
from bench.report.sections.cost import plots as cost_plots

DEPTHS, LENGTHS, VARIANTS = (1, 2, 8), (512, 2048), ("dense", "chunked")


def drawn(folder: Path, found: list[object]) -> tuple[object, Look]:
    frame = collect(write(folder, found)).frame
    return frame, Look(styles(zip(frame["variant"], frame["label"], strict=True)), "setting", "machine · day")


@pytest.mark.parametrize("plot", cost_plots.BY_DEPTH, ids=lambda plot: plot.stem)
def test_cost_against_depth_has_a_panel_a_length_and_a_point_a_cell(
    tmp_path: Path, plot: cost_plots.CostPlot
) -> None:
    found = [record(v, n, d) for v in VARIANTS for n in LENGTHS for d in DEPTHS]
    found.append(failed("oom", "too much", variant="dense", seq_len=2048, depth=16))
    frame, look = drawn(tmp_path / "e", found)
    cells = cost_plots.with_predictions(statistics.cost_cells(frame))
    figure = plot.draw(cells, look)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["512 tokens", "2k tokens"]
    for axis, length in zip(figure.axes, LENGTHS, strict=True):
        for variant in VARIANTS:
            own = cells[(cells.variant == variant) & (cells.seq_len == length)].set_index("depth")
            lines = [
                line
                for line in axis.get_lines()
                if line.get_color() == look.styles[own["label"].iloc[0]].colour and len(line.get_xdata()) > 1
            ]
            expected = [own[c.column].dropna() for c in plot.curves if own[c.column].notna().any()]
            assert len(lines) == len(expected)
            for line, values in zip(lines, expected, strict=True):
                np.testing.assert_array_equal(line.get_xdata(), values.index)
                np.testing.assert_array_equal(line.get_ydata(), values)
    crosses = [line for line in figure.axes[1].get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[16]]
    assert not [line for line in figure.axes[0].get_lines() if line.get_marker() == "x"]


def test_one_depth_is_not_drawn_against_depth(tmp_path: Path) -> None:
    frame, look = drawn(tmp_path / "e", [record("dense", n, 2) for n in LENGTHS])
    cells = statistics.cost_cells(frame)
    assert all(plot.draw(cells, look) is None for plot in cost_plots.BY_DEPTH)
    assert all(plot.draw(cells, look) is not None for plot in cost_plots.BY_LENGTH)


@pytest.mark.parametrize("plot", [*cost_plots.BY_LENGTH, *cost_plots.BY_DEPTH], ids=lambda plot: plot.stem)
@pytest.mark.slow
def test_a_panel_needs_several_places_on_its_axis(tmp_path: Path, plot: cost_plots.CostPlot) -> None:
    """Depth 2 has two lengths and depth 8 one; 2,048 tokens have one depth and 512 have two."""
    sizes = [(512, 2), (2048, 2), (512, 8)]
    frame, look = drawn(tmp_path / "e", [record(v, n, d) for v in VARIANTS for n, d in sizes])
    figure = plot.draw(statistics.cost_cells(frame), look)
    assert figure is not None
    titles = {"seq_len": ["depth 2"], "depth": ["512 tokens"]}
    assert [axis.get_title() for axis in figure.axes] == titles[plot.along.x]


def test_a_single_length_is_a_row_a_variant(tmp_path: Path) -> None:
    """What is executed and what is algorithmic differ in the dots, in the figure and in its legend."""
    found = [record(v, 2048, d) for v in VARIANTS for d in (1, 8)]
    found.append(failed("oom", "too much", variant="chunked", seq_len=2048, depth=16))
    frame, look = drawn(tmp_path / "e", found)
    cells = statistics.cost_cells(frame)
    for plot in cost_plots.BY_LENGTH:
        figure = plot.draw(cells, look)
        assert figure is not None
        assert [axis.get_title() for axis in figure.axes] == ["depth 1", "depth 8", "depth 16"]
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [*VARIANTS]
        crosses = [line for line in figure.axes[2].get_lines() if line.get_marker() == "x"]
        assert [list(line.get_ydata()) for line in crosses] == [[1]]
        legend = [text.get_text() for of in figure.legends for text in of.get_texts()]
        assert not {*legend} & {*VARIANTS}, "the rows have the names"
    flops = cost_plots.BY_LENGTH[-1].draw(cells, look)
    assert flops is not None
    full, hollow, _ = flops.legends[0].legend_handles
    assert (full.get_label(), hollow.get_label()) == ("executed", "algorithmic")
    assert (full.get_markerfacecolor(), hollow.get_markerfacecolor()) == ("#555555", "none")
    own = cells[(cells["depth"] == 1) & (cells["variant"] == "chunked")].iloc[0]
    dots = [bar.lines[0] for bar in flops.axes[0].containers]
    dots = [dot for dot in dots if dot.get_color() == look.styles["chunked"].colour]
    places = {float(dot.get_xdata()[0]): (float(dot.get_ydata()[0]), dot.get_fillstyle()) for dot in dots}
    (above, filled), (below, empty) = (
        places[own[f"flops_{kind}_step"]] for kind in ("executed", "algorithmic")
    )
    assert above < 1 < below, "side by side in the second row"
    assert filled != "none"
    assert empty == "none"
