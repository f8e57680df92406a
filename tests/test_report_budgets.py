"""What fits into a memory budget, and what training at the largest batch yields."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.lines import Line2D
from report_parts import part_of
from test_report import failed, number, record, table, write
from test_report_memory import (
    BUDGET,
    STRATEGIES,
    frame_of,
    look,
    payoffs,
    strategies,
    strategy,
    text_of,
)

from bench.measure import predict
from bench.records import Record
from bench.report import build
from bench.report.data.kinds import kinds
from bench.report.sections.budgets import data as budgets
from bench.report.sections.budgets import plots as budget_plots


def fits(variant: str, activations: str, depth: int, **other: Any) -> Record:
    """What fits, as a cell of measure=fits says it: nothing was run."""
    values: dict[str, Any] = {
        "cell_id": f"fits-{variant}-{activations}-{depth}-{other}",
        "measure": "fits",
        "peak_bytes_source": "predicted",
        "flops_source": "predicted",
        "budget_bytes": BUDGET,
        "longest_seq_len": 3072 * (2 if activations == "keep" else 7) // depth * 2,
        "largest_batch_size": 12 // depth,
        "step_seconds_median": None,
        "tokens_per_second": None,
        "leak_max_abs": None,
    }
    return strategy(variant, activations, depth, **{**values, **other})


def test_what_fits_by_variant_strategy_and_depth(tmp_path: Path) -> None:
    found = [fits(v, s, d) for v in ("dense", "longformer") for s in ("keep", "sqrt") for d in (4, 12)]
    found += [fits("performer", "keep", 4, longest_seq_len=2**22, largest_batch_size=2**16)]
    found += [fits("performer", "keep", 12, longest_seq_len=0, largest_batch_size=0)]
    early = failed("unsupported", "not causal", variant="chunked", depth=4)
    early.measure = "fits"
    text = part_of(tmp_path / "e", [*found, early], "fits").text
    rows = {(r["variant"], r["activations"]): r for r in table(text, "### clm, budget 1 GiB, length 512")}
    assert rows["dense", "keep"]["depth 4: longest"] == "3k"
    assert rows["dense", "sqrt"]["depth 4: longest"] == "10.5k"
    assert rows["longformer", "sqrt"]["depth 12: longest"] == "3.5k"
    assert rows["longformer", "sqrt"]["depth 4: batch"] == "3"
    assert rows["performer", "keep"]["depth 4: longest"] == "≥ 4M"
    assert rows["performer", "keep"]["depth 4: batch"] == "≥ 65,536"
    assert rows["performer", "keep"]["depth 12: longest"] == "nothing fits"
    assert rows["performer", "keep"]["depth 12: batch"] == "nothing fits"
    assert rows["chunked", "keep"]["depth 4: longest"] == "unsupported"
    assert rows["chunked", "keep"]["depth 12: longest"] == "–"
    assert list(rows) == [
        ("dense", "keep"),
        ("dense", "sqrt"),
        ("chunked", "keep"),
        ("longformer", "keep"),
        ("longformer", "sqrt"),
        ("performer", "keep"),
    ]


def test_the_search_ends_where_the_planner_ends_it() -> None:
    assert (budgets.LONGEST, budgets.LARGEST) == (predict.MAX_TOKENS, predict.MAX_SEQUENCES)


def dots(axis: Axes) -> list[Line2D]:
    return [line for line in axis.get_lines() if len(np.asarray(line.get_xdata())) == 1]


def test_dots_of_what_fits(tmp_path: Path) -> None:
    found = [fits(v, s, d) for v in ("dense", "longformer") for s in ("keep", "sqrt") for d in (4, 12)]
    found += [fits("performer", "keep", 4, longest_seq_len=2**22)]
    found += [fits("performer", "keep", 12, longest_seq_len=0)]
    frame = frame_of(tmp_path / "e", found)
    figure = budget_plots.longest(budgets.fits_cells(kinds(frame).fits), look(frame))
    assert figure is not None
    for axis, depth in zip(figure.axes, (4, 12), strict=True):
        assert axis.get_title() == f"depth {depth}"
        assert axis.get_xscale() == "log"
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        lines = [line for line in dots(axis) if line.get_marker() != "x"]
        drawn = {
            (names[round(float(np.asarray(line.get_ydata())[0]))], float(np.asarray(line.get_xdata())[0]))
            for line in lines
        }
        expected = {(r.variant, r.longest_seq_len) for r in found if r.depth == depth and r.longest_seq_len}
        assert drawn == expected
    assert [text.get_text() for text in figure.axes[0].texts] == ["≥ 4M"]
    assert [line.get_marker() for line in dots(figure.axes[1])].count("x") == 1


def test_batch_payoff_is_paired_with_keep_within_a_replicate(tmp_path: Path) -> None:
    found = payoffs()
    text = part_of(tmp_path / "e", found, "payoff").text
    rows = {
        (r["variant"], r["activations"]): r for r in table(text, "### clm, depth 4, budget 1 GiB, length 512")
    }
    assert rows["dense", "keep"]["largest batch"] == "4"
    assert rows["dense", "reversible"]["largest batch"] == "25"
    at = {
        (r.activations, r.replicate): r.tokens_per_second
        for r in found
        if r.variant == "dense" and r.status == "ok"
    }
    for name in ("keep", "checkpoint", "reversible"):
        pairs = [(at[name, rep] or 0, at["keep", rep] or 1) for rep in (0, 1, 2)]
        row = rows["dense", name]
        assert number(row["/ keep"]) == pytest.approx(statistics.median(a / b for a, b in pairs), rel=6e-3)
        assert number(row["throughput"]) == pytest.approx(statistics.median(a for a, _ in pairs), rel=6e-3)
    assert rows["longformer", "checkpoint"]["/ keep"] == "–"
    assert rows["longformer", "keep"]["largest batch"] == "nothing fits"
    assert rows["longformer", "keep"]["status"] == "predicted_oom"
    assert rows["chunked", "keep"]["status"] == "unsupported"


def test_dots_of_the_payoff(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", payoffs())
    cells = budgets.payoff_cells(kinds(frame).payoff)
    figure = budget_plots.payoff(cells, look(frame))
    assert figure is not None
    rate, gain = figure.axes
    notes = {text.get_text() for text in rate.texts}
    assert notes == {"batch 4", "batch 16", "batch 25"}
    values = sorted(float(np.asarray(line.get_xdata())[0]) for line in dots(gain))
    assert values == pytest.approx([1.0, 2.0 * 1.1, 2.5 * 1.1])


@pytest.mark.slow
def test_budgets_leave_the_other_sections_as_they_were(tmp_path: Path) -> None:
    plain = [record(v, depth=d, seq_len=n) for v in ("dense", "chunked") for d in (2, 4) for n in (512, 1024)]
    asked = [fits("dense", "keep", 4), *payoffs()]
    alone = build(write(tmp_path / "alone", plain))
    mixed = build(write(tmp_path / "mixed", [*plain, *asked]))
    assert (alone / "summary.csv").read_text() == (mixed / "summary.csv").read_text()
    for path in (alone / "plots").glob("*.svg"):
        assert path.read_bytes() == (mixed / "plots" / path.name).read_bytes(), path.name
    assert len(list((mixed / "plots").glob("*.svg"))) == len(list((alone / "plots").glob("*.svg"))) + 3

    def section(report: Path, title: str) -> str:
        return (report / "summary.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]

    for title in ("Cost", "Quality", "Parameters"):
        assert section(alone, title) == section(mixed, title)


def test_a_cell_of_a_given_batch_that_was_measured_is_in_cost_and_in_what_fits(tmp_path: Path) -> None:
    both = fits("dense", "keep", 4, peak_bytes_source="live_storage", step_seconds_median=0.25)
    part = part_of(tmp_path / "e", [both], "cells", "fits")
    assert part.files()["summary"].step_seconds_median.tolist() == [0.25]
    assert table(part.text, "### clm, budget 1 GiB, length 512")[0]["depth 4: longest"] == "3k"


def test_an_unfinished_cell_without_a_budget_stays_where_cells_without_one_are(tmp_path: Path) -> None:
    lost = failed("oom", "too big", variant="chunked")
    same_measure = fits("dense", "keep", 4, measure="standard")
    text = part_of(tmp_path / "e", [record(), lost, same_measure, *payoffs()], "cost").text
    assert [r["variant"] for r in table(text, "### clm, depth 2")] == ["dense", "chunked"]


@pytest.mark.slow
def test_every_memory_picture_is_drawn_and_linked(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    found = [*strategies(), *payoffs(), *(fits("dense", s, d) for s in STRATEGIES for d in (4, 12))]
    text = text_of(folder, found, plots=True)
    plots = folder / "report" / "plots"
    stems = {"peak_parts", "activations_by_depth", "peak_by_depth", "longest_sequence"}
    stems |= {"longest_sequence", "largest_batch", "batch_payoff"}
    stems |= {f"pareto-depth_{depth}" for depth in (2, 4, 8)}
    linked = {
        f"{cost}_by_depth-activations_keep" for cost in ("step_time", "forward_time", "peak_memory", "flops")
    }
    assert {path.stem for path in plots.glob("*.png")} == stems | linked
    assert all(f"](plots/{stem}.png)" in text for stem in linked)
    for stem in stems:
        assert imread(plots / f"{stem}.png").std() > 0.01
        assert f"](plots/{stem}.png)](plots/{stem}.svg)" in text


@pytest.mark.slow
def test_a_sweep_over_strategies_is_not_a_flood(tmp_path: Path) -> None:
    """Cost against length: none where there is one length; else keep's pictures, links to the others."""
    folder = tmp_path / "e"
    found = [
        strategy("dense", s, 2, seq_len=n, cell_id=f"{s}{n}") for s in ("keep", "sqrt") for n in (512, 1024)
    ]
    text = text_of(folder, found, plots=True)
    assert "](plots/step_time-activations_keep.png)](plots/step_time-activations_keep.svg)" in text
    assert "[![Time of a training step against sequence length (activations sqrt)]" not in text
    assert "](plots/step_time-activations_sqrt.png)" in text
    assert text.count("<details>") == 1
    rows = table(text, "<details><summary>clm, activations sqrt, depth 2</summary>")
    assert [r["length"] for r in rows] == ["512", "1024"]
    assert table(text, "### clm, activations keep, depth 2")
