"""Learning rates, histories and training curves: what the report says of them."""

from __future__ import annotations

import math
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from test_report import failed, record, table, write
from test_report_memory import frame_of, look, text_of

from bench import records
from bench.records import Record
from bench.report import build, curve_plots, rate_plots
from bench.report.collect import collect
from bench.report.curves import training_curves
from bench.report.rates import rate_cells
from bench.report.statistics import quality_cells
from bench.train import loss_curve as kept

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
    folder = tmp_path / "e"
    text = text_of(folder, search())
    rows = {
        row["variant"]: row
        for row in table(text.split("## Learning rates", 1)[1], "### clm, data plays, width 64, 4 heads")
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
    figures = pd.read_csv(folder / "report" / "rates.csv")
    assert len(figures) == len(LOSSES) * len(RATES)
    assert set(figures[figures.best].learning_rate) == {0.001, 0.002, 0.008}


def test_a_variant_that_diverges_at_every_rate_has_no_best(tmp_path: Path) -> None:
    lost = [
        failed("diverged", "the loss became nan", variant="routing", cell_id=f"r{rate}", learning_rate=rate)
        for rate in RATES
    ]
    for one in lost:
        one.train_budget, one.train_amount, one.eval_split = "tokens", 150_000.0, "validation"
    text = text_of(tmp_path / "e", [*search(), *lost], plots=True)
    rows = {
        row["variant"]: row
        for row in table(text.split("## Learning rates", 1)[1], "### clm, data plays, width 64, 4 heads")
    }
    assert (rows["routing"]["best rate"], rows["routing"]["at the edge"]) == ("–", "–")
    assert rows["routing"]["diverged"] == "0.001, 0.002, 0.004, 0.008"


def test_one_rate_is_no_search(tmp_path: Path) -> None:
    found = [record(v, learning_rate=rate, cell_id=v) for v, rate in (("dense", 0.001), ("chunked", 0.002))]
    folder = tmp_path / "e"
    assert "## Learning rates" not in text_of(folder, found, plots=True)
    assert not (folder / "report" / "rates.csv").exists()
    assert not list((folder / "report" / "plots").glob("learning_rates*"))


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
    expected = [statistics.mean([math.exp(nll), math.exp(nll + 0.02)]) for nll in LOSSES["longformer"]]
    assert points(axis, style.colour, style.marker) == [
        (rate, pytest.approx(value)) for rate, value in zip(RATES, expected, strict=True)
    ]
    assert points(axis, style.colour, "o") == [(0.008, pytest.approx(expected[3]))]
    (cross,) = points(axis, look(frame).styles["dense"].colour, "x")
    assert cross[0] == 0.008
    highest = axis.transLimits.transform((0, statistics.mean([math.exp(2.1), math.exp(2.12)])))[1]
    assert highest < cross[1] - 0.09, "the cross lies above the data"


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
    figure = curve_plots.by_history(frame, look(frame))
    assert figure is not None
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    style = look(frame).styles["dense"]
    drawn = next(
        line for line in axis.get_lines() if line.get_color() == style.colour and line.get_linestyle() == "-"
    )
    assert list(np.asarray(drawn.get_xdata())) == [1, 2, 4, 8, 16, 20]
    assert list(np.asarray(drawn.get_ydata())) == pytest.approx([x + 0.05 for x in losses])
    assert points(axis, style.colour, "o") == [(8, pytest.approx(2.05))]
    assert points(axis, look(frame).styles["chunked"].colour, "o") == [(20, pytest.approx(1.8))]
    (band,) = [c for c in axis.collections if isinstance(c, PolyCollection)]
    edges = np.asarray(band.get_paths()[0].vertices)
    assert (edges[:, 1].min(), edges[:, 1].max()) == pytest.approx((1.8, 3.1))


def test_records_without_histories_have_no_picture(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", [record()])
    assert curve_plots.by_history(frame, look(frame)) is None


def write_curve(folder: Path, one: Record, losses: list[float], step_tokens: int = 100) -> None:
    path = records.curve_path_of(folder, one.cell_id)
    path.parent.mkdir(exist_ok=True)
    curve = kept.Curve()
    for step, nll in enumerate(losses, start=1):
        curve.add(kept.Row(step, 0.1 * step, 0.003, nll))
    path.write_text(curve.csv(step_tokens))


def test_training_loss_is_the_median_over_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    found = [record(replicate=r, cell_id=f"c{r}") for r in range(3)]
    found += [
        record("chunked", cell_id="none"),
        failed("timeout", "late", variant="chunked", depth=2, cell_id="late"),
    ]
    write(folder, found)
    steps = 4 * curve_plots.BINS
    # The last is half as long: all are drawn as far as it goes.
    for r, (level, length) in enumerate(((5.0, steps * 2), (1.0, steps * 2), (2.0, steps))):
        write_curve(folder, found[r], [level + 1 / step for step in range(1, length + 1)])
    write_curve(folder, found[-1], [9.0] * steps)
    frame = collect(folder).frame
    taken, problems = training_curves(frame, folder)
    assert problems == []
    assert sorted(taken["cell_id"]) == ["c0", "c1", "c2"]
    figure = curve_plots.training_loss(taken, look(frame))
    assert figure is not None
    (line,) = figure.axes[0].get_lines()
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert list(x) == pytest.approx([400 * (k + 1) for k in range(curve_plots.BINS)])
    each = [
        statistics.mean(2 + 1 / step for step in range(4 * k + 1, 4 * k + 5)) for k in range(curve_plots.BINS)
    ]
    assert list(y) == pytest.approx(each)


def test_a_file_that_is_no_curve_is_named_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    found = [record(replicate=r, cell_id=f"c{r}") for r in range(2)]
    write(folder, found)
    write_curve(folder, found[0], [3.0, 2.0])
    records.curve_path_of(folder, "c1").write_text("neither\nnor\n")
    text = (build(folder) / "summary.md").read_text()
    assert "c1.csv: not a training curve" in text
    assert "](plots/training_loss.png)](plots/training_loss.svg)" in text
