"""Plots hold what the aggregated cells hold, point by point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_report import failed, record, write

from bench.report import cost_plots, quality_plots, statistics
from bench.report.collect import collect
from bench.report.lines import Look
from bench.report.style import styles

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


def test_the_context_that_is_used_with_its_widest_interval(tmp_path: Path) -> None:
    found = [
        record(
            "dense",
            replicate=r,
            effective_context=64 << r,
            effective_context_low=16 << r,
            effective_context_high=256 << r,
        )
        for r in range(3)
    ]
    frame, look = drawn(tmp_path / "e", found)
    figure = quality_plots.context(statistics.quality_cells(frame), look)
    assert figure is not None
    (axis,) = figure.axes
    ((line, caps, bars),) = [c.lines for c in axis.containers]
    assert list(line.get_xdata()) == [128]
    assert sorted(float(cap.get_xdata()[0]) for cap in caps) == [16, 1024]
    assert bars[0].get_segments()[0][:, 0].tolist() == [16, 1024]


def test_no_picture_of_a_context_that_nobody_measured(tmp_path: Path) -> None:
    frame, look = drawn(tmp_path / "e", [record()])
    assert quality_plots.context(statistics.quality_cells(frame), look) is None
