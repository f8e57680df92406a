"""The section on models from which heads or visits were removed after training."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_parts import part_of
from test_report import record, table
from test_report_memory import frame_of, look

from bench.records import Record
from bench.report.sections.pruning import drawing

HEADS, LOSSES = [8, 4, 2], ([4.0, 4.5, 6.0], [4.4, 4.5, 6.6])
"""Heads that are kept, and nats of two replicates."""


def pruned(**other: Any) -> list[Record]:
    return [
        record(
            replicate=r,
            cell_id=f"pruned-{r}",
            nll=nlls[0],
            bits_per_byte=nlls[0] / 2,
            heads_kept=HEADS,
            nll_heads_kept=nlls,
            **other,
        )
        for r, nlls in enumerate(LOSSES)
    ]


def test_the_table_has_a_row_for_each_number_of_heads(tmp_path: Path) -> None:
    """In bits per byte, by the factor of each record from nats."""
    text = part_of(tmp_path / "x", pruned(), "pruning").text
    (heading,) = [line for line in text.splitlines() if line.startswith("### heads: ")]
    rows = table(text, heading)
    assert [row["heads kept"] for row in rows] == ["8 of 8", "4 of 8", "2 of 8"]
    assert [row["replicates"] for row in rows] == ["2"] * 3
    for place, row in enumerate(rows):
        bits = [nlls[place] / 2 for nlls in LOSSES]
        assert row["bits per byte"] == f"{statistics.mean(bits):.3f} ± {statistics.stdev(bits):.3f}"
        extra = statistics.mean((nlls[place] - nlls[0]) / 2 for nlls in LOSSES)
        assert row["− all"] == (f"+{extra:.3f}" if place else "–")
    assert "visits: " not in text


def test_the_figure_has_a_line_over_the_share_that_is_kept(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "x", [*pruned(), record("longformer", cell_id="whole")])
    figure = drawing("heads")(frame, look(frame))
    assert figure is not None
    (axis,) = figure.axes
    (line,) = [line for line in axis.get_lines() if len(np.asarray(line.get_xdata())) == 3]
    assert list(np.asarray(line.get_xdata())) == [1.0, 0.5, 0.25]
    assert list(np.asarray(line.get_ydata())) == pytest.approx(
        [statistics.mean(pair) / 2 for pair in zip(*LOSSES, strict=True)]
    )


def test_visits_are_a_table_of_their_own_and_nothing_is_no_section(tmp_path: Path) -> None:
    visits = {"visits_kept": [4, 3], "nll_visits_kept": [1.0, 1.2], "nll": 1.0, "bits_per_byte": 0.5}
    text = part_of(tmp_path / "x", [record(**visits)], "pruning").text
    (heading,) = [line for line in text.splitlines() if line.startswith("### visits: ")]
    assert [row["visits kept"] for row in table(text, heading)] == ["4 of 4", "3 of 4"]
    assert "## Pruning" not in part_of(tmp_path / "y", [record()], "pruning").text


def test_the_visits_that_a_token_needs_have_a_column(tmp_path: Path) -> None:
    found = [record(cell_id="early", stack="early_exit", visits_per_token=2.25)]
    text = part_of(tmp_path / "x", found, "quality").text
    assert "| visits / token |" in text
    assert "| 2.250 |" in " ".join(text.split())
