"""A search over learning rates: each variant's best, as a table and as a picture."""

from __future__ import annotations

import math
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from report_parts import part_of
from test_report import failed, record, table
from test_report_memory import frame_of, look

from bench.records import Record
from bench.report.data.statistics import quality_cells
from bench.report.sections.rates import plots as rate_plots
from bench.report.sections.rates.data import rate_cells

RATES = (0.001, 0.002, 0.004, 0.008)
LOSSES = {
    "dense": (1.9, 1.6, 1.7, 1.5),  # the last diverges in one replicate
    "chunked": (1.8, 1.9, 2.0, 2.1),
    "longformer": (1.9, 1.8, 1.7, 1.6),
}


def search() -> list[Record]:
    """Three variants at four rates with two replicates."""
    found = []
    for variant, (rate, loss), replicate in product(LOSSES, enumerate(RATES), (0, 1)):
        nll = LOSSES[variant][rate] + 0.02 * replicate
        trained: dict[str, Any] = {"learning_rate": loss, "train_budget": "tokens", "train_amount": 150_000.0}
        trained |= {"eval_split": "validation", "cell_id": f"{variant}-{rate}-{replicate}"}
        where: dict[str, Any] = {"variant": variant, "replicate": replicate, **trained}
        if (variant, rate, replicate) == ("dense", 3, 1):
            found.append(failed("diverged", "the loss became nan", **where))
        else:
            found.append(record(nll=nll, perplexity=math.exp(nll), **where))
    return found


def test_the_best_rate_and_whether_it_lies_at_the_edge(tmp_path: Path) -> None:
    part = part_of(tmp_path / "e", search(), "rates")
    rows = {
        row["variant"]: row
        for row in table(part.text.split("## Learning rates", 1)[1], "### clm, data plays, width 64, 4 heads")
    }
    assert {variant: (row["best rate"], row["at the edge"]) for variant, row in rows.items()} == {
        "dense": ("0.002", "no"),
        "chunked": ("0.001", "lowest tried"),
        "longformer": ("0.008", "highest tried"),
    }
    perplexities = [math.exp(1.6), math.exp(1.62)]
    spread = f"{statistics.mean(perplexities):.3f} ± {statistics.stdev(perplexities):.3f}"
    assert rows["dense"]["perplexity"] == spread
    assert {row["split"] for row in rows.values()} == {"validation"}
    assert {row["rates tried"] for row in rows.values()} == {"0.001, 0.002, 0.004, 0.008"}
    assert {variant: row["diverged"] for variant, row in rows.items()} == {
        "dense": "0.008",
        "chunked": "–",
        "longformer": "–",
    }
    figures = part.files()["rates"]
    assert len(figures) == len(LOSSES) * len(RATES)
    assert set(figures[figures.best].learning_rate) == {0.001, 0.002, 0.008}


def test_a_variant_that_diverges_at_every_rate_has_no_best(tmp_path: Path) -> None:
    lost = [
        failed("diverged", "the loss became nan", variant="routing", cell_id=f"r{rate}", learning_rate=rate)
        for rate in RATES
    ]
    for one in lost:
        one.train_budget, one.train_amount, one.eval_split = "tokens", 150_000.0, "validation"
    part = part_of(tmp_path / "e", [*search(), *lost], "rates")
    assert part.drawn("rates")
    rows = {
        row["variant"]: row
        for row in table(part.text.split("## Learning rates", 1)[1], "### clm, data plays, width 64, 4 heads")
    }
    assert (rows["routing"]["best rate"], rows["routing"]["at the edge"]) == ("–", "–")
    assert rows["routing"]["diverged"] == "0.001, 0.002, 0.004, 0.008"


def test_one_rate_is_no_search(tmp_path: Path) -> None:
    found = [record(v, learning_rate=rate, cell_id=v) for v, rate in (("dense", 0.001), ("chunked", 0.002))]
    part = part_of(tmp_path / "e", found, "rates")
    assert "## Learning rates" not in part.text
    assert "rates" not in part.files()
    assert not part.drawn("rates")


def searched(variant: str, nlls: list[float | None], finals: tuple[float, ...]) -> list[Record]:
    """Replicates that share the search of a rate, which took the least of these losses."""
    best = min(range(len(nlls)), key=lambda at: math.inf if nlls[at] is None else float(nlls[at] or 0))
    found = []
    for replicate, nll in enumerate(finals):
        cell = record(variant, replicate=replicate, nll=nll, learning_rate=RATES[best])
        cell.train_budget, cell.train_amount = "tokens", 150_000.0
        cell.learning_rates_tried, cell.learning_rate_nlls = list(RATES[: len(nlls)]), nlls
        found.append(cell)
    return found


def test_a_search_is_decided_by_losses_or_by_chance(tmp_path: Path) -> None:
    """By √2 standard deviations of the final loss, that is the spread of a difference of two trainings."""
    decided = searched("dense", [1.9, 1.6, 1.75], (1.5, 1.6))  # gap 0.15, noise √2 · 0.0707 = 0.1
    by_chance = searched("chunked", [1.61, None, 1.6], (1.5, 1.54))  # gap 0.01, noise 0.04
    single = searched("longformer", [1.6, 1.7], (1.5,))
    part = part_of(tmp_path / "e", [*decided, *by_chance, *single], "searches")
    text = part.text.split("## Searched learning rates", 1)[1]
    rows = {row["variant"]: row for row in table(text, "### clm, data plays, width 64, 4 heads")}
    assert {name: row["decided by"] for name, row in rows.items()} == {
        "dense": "loss",
        "chunked": "chance",
        "longformer": "–",
    }
    assert rows["dense"]["losses by rate, nats"] == "0.001: 1.900, 0.002: 1.600, 0.004: 1.750"
    assert rows["chunked"]["losses by rate, nats"] == "0.001: 1.610, 0.002: diverged, 0.004: 1.600"
    assert (rows["dense"]["to the next"], rows["dense"]["noise"]) == ("0.150", "0.100")
    assert {name: row["at the edge"] for name, row in rows.items()} == {
        "dense": "no",
        "chunked": "highest tried",
        "longformer": "lowest tried",
    }
    assert [row["replicates"] for row in rows.values()] == ["2", "2", "1"]
    assert set(part.files()["searches"]["decided"].dropna()) == {True, False}


def test_where_no_cell_searches_nothing_is_said_of_it(tmp_path: Path) -> None:
    part = part_of(tmp_path / "e", search(), "searches")
    assert "Searched learning rates" not in part.text
    assert not part.files()


def points(axis: Axes, colour: str, marker: str) -> list[tuple[float, float]]:
    """The points of a line, a ring or the crosses of that colour."""
    found = [
        line
        for line in axis.get_lines()
        if line.get_color() == colour
        and line.get_marker() == marker
        and (marker != "o" or line.get_markersize() == 10)
    ]
    return [
        (float(x), float(y))
        for line in found
        for x, y in zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
    ]


def test_lines_over_the_rates_ring_the_best(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", search())
    figure = rate_plots.by_rate(rate_cells(frame, quality_cells(frame)), look(frame))
    assert figure is not None
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == [f"{rate:g}" for rate in RATES]
    style = look(frame).styles["longformer"]
    expected = [(nll + 0.01) / math.log(2) for nll in LOSSES["longformer"]]
    assert points(axis, style.colour, style.marker) == [
        (rate, pytest.approx(value)) for rate, value in zip(RATES, expected, strict=True)
    ]
    assert points(axis, style.colour, "o") == [(0.008, pytest.approx(expected[3]))]
    (cross,) = points(axis, look(frame).styles["dense"].colour, "x")
    assert cross[0] == 0.008
    highest = axis.transLimits.transform((0, 2.11 / math.log(2)))[1]
    assert highest < cross[1] - 0.09, "the cross lies above the data"


def test_searches_with_other_budgets_are_other_trainings(tmp_path: Path) -> None:
    """Their results are not averaged, and one seed is one replicate."""
    found = [*searched("dense", [1.6, 1.7], (1.5,)), *searched("dense", [1.5, 1.7], (1.4,))]
    for cell, budget in zip(found, ("smallest", "largest"), strict=True):
        cell.search_budget, cell.cell_id = budget, budget
    part = part_of(tmp_path / "e", found, "quality", "searches")
    text = part.text.split("## Quality", 1)[1]
    rows = table(text, "### clm, data plays")
    assert sorted(
        (row["rate searched with"], row["replicates"]) for row in rows if "dense" in row["variant"]
    ) == [
        ("largest", "1"),
        ("smallest", "1"),
    ]
