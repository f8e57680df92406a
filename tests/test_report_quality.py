"""Quality as pictures: the context that is used, and loss by how far back is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from test_report import record
from test_report_cost import drawn
from test_report_memory import frame_of, look
from test_report_rates import points

from bench.records import Record
from bench.report.data import statistics
from bench.report.figures.baselines import NAMES, UNIGRAM
from bench.report.sections.quality import plots as quality_plots
from bench.report.sections.quality.by_position import by_answer, by_history

LN2 = math.log(2)
"""Nats in a bit: text is drawn in bits per byte."""


def histories(variant: str, replicate: int, losses: list[float | None], **other: Any) -> Record:
    return record(
        variant,
        replicate=replicate,
        seq_len=20,
        nll_by_history=losses,
        nll_by_position=None,
        cell_id=f"{variant}{replicate}{len(other)}",
        **other,
    )


def test_lines_over_history_end_at_the_full_one_and_ring_the_effective_context(tmp_path: Path) -> None:
    losses = [3.0, 2.5, 2.2, 2.0, 1.9, 1.8]  # 1, 2, 4, 8, 16 and 20 tokens
    found = [histories("dense", r, [x + 0.1 * r for x in losses], effective_context=8) for r in (0, 1)]
    found += [histories("chunked", 0, losses, effective_context=20)]
    frame = frame_of(tmp_path / "e", found)
    figure = by_history(frame, look(frame))
    assert figure is not None
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    style = look(frame).styles["dense"]
    drawn = next(
        line for line in axis.get_lines() if line.get_color() == style.colour and line.get_linestyle() == "-"
    )
    assert list(np.asarray(drawn.get_xdata())) == [1, 2, 4, 8, 16, 20]
    assert list(np.asarray(drawn.get_ydata())) == pytest.approx([(x + 0.05) / LN2 for x in losses])
    assert points(axis, style.colour, "o") == [(8, pytest.approx(2.05 / LN2))]
    assert points(axis, look(frame).styles["chunked"].colour, "o") == [(20, pytest.approx(1.8 / LN2))]
    (band,) = [c for c in axis.collections if isinstance(c, PolyCollection)]
    edges = np.asarray(band.get_paths()[0].vertices)
    assert (edges[:, 1].min(), edges[:, 1].max()) == pytest.approx((1.8 / LN2, 3.1 / LN2))


def test_the_answers_of_dialogues_are_counted_from_one(tmp_path: Path) -> None:
    losses: list[float | None] = [3.0, None, 2.2]
    found = [histories("dense", r, [], nll_by_answer=losses) for r in (0, 1)]
    frame = frame_of(tmp_path / "e", found)
    figure = by_answer(frame, look(frame))
    assert figure is not None
    (axis,) = figure.axes
    (drawn,) = axis.get_lines()
    assert list(np.asarray(drawn.get_xdata())) == [1, 3]
    assert list(np.asarray(drawn.get_ydata())) == pytest.approx([3.0 / LN2, 2.2 / LN2])
    assert by_answer(frame.assign(nll_by_answer=None), look(frame)) is None


def test_records_without_histories_have_no_picture(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", [record()])
    assert by_history(frame, look(frame)) is None


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


def baselines_of(axis: Axes) -> set[str]:
    """The baselines that are drawn in a panel."""
    return {str(line.get_gid()) for line in axis.get_lines()} & set(NAMES)


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


CONTEXT = {"effective_context": 64, "effective_context_low": 16, "effective_context_high": 256}
TEXT = {"ngram_bits_per_byte": [4.5, 3.5, 3.0, 2.6, 2.4], "gzip_bits_per_byte": 2.7}


def test_bits_per_byte_of_baselines_are_no_tokens_of_history(tmp_path: Path) -> None:
    found = [record(v, replicate=r, **CONTEXT, **TEXT) for v in ("dense", "chunked") for r in range(2)]
    frame, look = drawn(tmp_path / "e", found)
    cells = statistics.quality_cells(frame)
    figure = quality_plots.context(cells, look)
    assert figure is not None
    assert baselines_of(figure.axes[0]) == set()
    assert legend_of(figure) == []


@pytest.mark.parametrize(("perplexity", "is_drawn"), [(2**2.8, True), (2**9.25, False)])
def test_a_baseline_is_a_line_and_in_the_legend_or_a_note(
    tmp_path: Path, perplexity: float, is_drawn: bool
) -> None:
    bits = {"dense": 2.5, "chunked": 2.6, "longformer": 2.9}
    found = [record(v, nll=b * LN2, unigram_perplexity=perplexity, **TEXT) for v, b in bits.items()]
    frame, look = drawn(tmp_path / "e", found)
    figure = quality_plots.losses(statistics.quality_cells(frame), look)
    assert figure is not None
    (axis,) = figure.axes
    assert (UNIGRAM in baselines_of(axis)) is is_drawn
    assert legend_of(figure) == [
        *(["unigram"] if is_drawn else []),
        "3-gram table",
        "5-gram table",
        "gzip -9",
    ]
    assert ("beyond the axis: unigram 9.250" in str(figure.get_supxlabel())) is not is_drawn
    assert [axis.get_title(loc=side) for side in ("left", "center", "right")] == ["", "depth 2", ""]
    named = [text.get_text() for text in axis.get_yticklabels()]
    assert named == ["dense · 512", "chunked · 512", "longformer · 512"]
