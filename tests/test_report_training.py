"""Training curves: read from files, drawn as the median over them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from report_parts import part_of, sections_of
from test_report import failed, record, write
from test_report_memory import look

from bench import records
from bench.records import Record
from bench.report import summary
from bench.report.builder import build_report
from bench.report.data.collect import collect
from bench.report.sections.training.data import training_curves
from bench.report.sections.training.plots import BINS, training_loss, validation_loss
from bench.train import loss_curve as kept


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
    steps = 4 * BINS
    # The last is half as long: all are drawn as far as it goes.
    for r, (level, length) in enumerate(((5.0, steps * 2), (1.0, steps * 2), (2.0, steps))):
        write_curve(folder, found[r], [level + 1 / step for step in range(1, length + 1)])
    write_curve(folder, found[-1], [9.0] * steps)
    frame = collect(folder).frame
    taken, problems = training_curves(frame, folder)
    assert problems == []
    assert sorted(taken["cell_id"]) == ["c0", "c1", "c2"]
    figure = training_loss(taken, look(frame))
    assert figure is not None
    (line,) = figure.axes[0].get_lines()
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert list(x) == pytest.approx([400 * (k + 1) for k in range(BINS)])
    each = [statistics.mean(2 + 1 / step for step in range(4 * k + 1, 4 * k + 5)) for k in range(BINS)]
    assert list(y) == pytest.approx([nats / math.log(2) for nats in each])


def test_a_file_that_is_no_curve_is_named_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    found = [record(replicate=r, cell_id=f"c{r}") for r in range(2)]
    write(folder, found)
    write_curve(folder, found[0], [3.0, 2.0])
    records.curve_path_of(folder, "c1").write_text("neither\nnor\n")
    text = (build_report(folder, sections=sections_of("cells", "training")) / "summary.md").read_text()
    assert "c1.csv: not a training curve" in text
    assert "](plots/training_loss.png)](plots/training_loss.svg)" in text


def test_validation_loss_is_over_the_records_that_were_validated_at_the_same_tokens(tmp_path: Path) -> None:
    """One replicate ended early, and one number is missing: a point has the records that have it."""
    folder = tmp_path / "e"
    part = part_of(
        folder,
        [
            record(
                replicate=0, cell_id="a", validation_tokens=[100, 200, 300], validation_nll=[4.0, 3.0, 2.0]
            ),
            record(replicate=1, cell_id="b", validation_tokens=[100, 200], validation_nll=[6.0, None]),
            record(replicate=2, cell_id="c"),
        ],
        "training",
    )
    text = summary.text(part.results, part.drawn("training"))
    assert "](plots/validation_loss.png)](plots/validation_loss.svg)" in text
    frame = collect(folder).frame
    figure = validation_loss(frame[frame["validation_nll"].notna()], look(frame))
    assert figure is not None
    (line,) = figure.axes[0].get_lines()
    assert list(np.asarray(line.get_xdata())) == [100, 200, 300]
    assert list(np.asarray(line.get_ydata())) == pytest.approx([n / math.log(2) for n in (5.0, 3.0, 2.0)])
