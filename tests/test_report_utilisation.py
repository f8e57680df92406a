"""Utilisation: the share of a machine's best matrix-product rate that a step reaches."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pandas as pd
import pytest
from report_parts import part_of
from test_report import table
from test_report_memory import frame_of, look
from test_report_pareto import model

from bench.records import Record
from bench.report.data.statistics import cost_cells
from bench.report.sections.utilisation import data as roofline
from bench.report.sections.utilisation import plots as roofline_plots


def utilisation_of(frame: pd.DataFrame) -> pd.DataFrame:
    return roofline.utilisation_cells(cost_cells(frame), roofline.peaks(frame))


def used(seq_len: int, share: float, replicate: int = 0, peak: float | None = 1e9) -> Record:
    flops = 10**6 * seq_len
    seconds = flops / (share * 1e9)
    known = {"flops_algorithmic_step": flops, "peak_flops_per_second": peak, "peak_bytes_per_second": peak}
    return model("dense", 2.0, seconds, replicate, seq_len=seq_len, mfu=None, **known)


def test_all_cells_of_a_machine_are_held_against_the_highest_peak(tmp_path: Path) -> None:
    """The peak was first taken as the machine was busy."""
    found = [used(512, 0.5, peak=0.8e9), used(1024, 0.6), used(2048, 0.9, peak=None)]
    cells = utilisation_of(frame_of(tmp_path, found))
    assert dict(zip(cells["seq_len"], cells["utilisation"], strict=True)) == pytest.approx(
        {512: 0.5, 1024: 0.6, 2048: 0.9}
    )


def test_records_without_a_peak_have_no_utilisation(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, [used(512, 0.5, peak=None), used(1024, 0.5, peak=None)])
    assert roofline.peaks(frame).empty
    assert utilisation_of(frame).empty
    assert roofline_plots.utilisation(utilisation_of(frame), look(frame)) is None


def test_utilisation_is_drawn_with_its_interval(tmp_path: Path) -> None:
    found = [used(n, s, r) for (n, s), r in itertools.product(((512, 0.3), (1024, 0.6)), (0, 1))]
    found += [used(2048, 0.7, 0), used(2048, 0.8, 1)]
    frame = frame_of(tmp_path, found)
    cells = utilisation_of(frame)
    last = cells.set_index("seq_len").loc[2048]
    assert (last["utilisation_low"], last["utilisation_high"]) == pytest.approx((0.7, 0.8))
    figure = roofline_plots.utilisation(cells, look(frame))
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert low == 0
    assert 0.8 < high <= 1


def test_the_report_names_the_peaks(tmp_path: Path) -> None:
    text = part_of(tmp_path, [used(512, 0.5), used(1024, 0.5)], "utilisation").text
    (row,) = table(text, "## Utilisation")
    assert row["matrix products"] == "1.00 GFLOP/s"
    assert math.isclose(float(row["copies"].split()[0]), 1e9 / 2**20, rel_tol=1e-2)
