"""Memory by activation strategy: recomputation, parts of the peak, errors of predictions."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from report_parts import part_of
from test_report import failed, number, record, table, write

from bench.records import Record
from bench.report import build
from bench.report.data.collect import collect, relabelled
from bench.report.data.statistics import cost_cells
from bench.report.figures import canvas
from bench.report.figures.lines import Look
from bench.report.figures.style import styles
from bench.report.sections.memory import data as memory
from bench.report.sections.memory import plots as memory_plots

STRATEGIES = ("keep", "checkpoint", "sqrt", "selective", "reversible")
SAVED = {"keep": 1.0, "checkpoint": 0.1, "sqrt": 0.07, "selective": 0.6, "reversible": 0.04}
PARTS = ("param_bytes", "optimizer_bytes", "peak_grad_bytes", "peak_activation_bytes", "peak_workspace_bytes")
BUDGET = 2**30


def strategy(variant: str, activations: str, depth: int, replicate: int = 0, **other: Any) -> Record:
    """A finished cell whose parts add up to its peak."""
    noise = random.Random(f"{variant}{activations}{depth}{replicate}{other}")
    params = 4_000 * depth
    kept = int(50_000 * depth * SAVED.get(activations, 0.5))
    grads, work = params // 2, 9_000 + noise.randrange(1_000)
    peak = params * 3 + grads + kept + work
    values: dict[str, Any] = {
        "cell_id": f"{variant}-{activations}-{depth}-{replicate}-{noise.getrandbits(48):x}",
        "activations": activations,
        "step_seconds_median": 0.1 * depth * (1 + noise.random()),
        "flops_executed_step": depth * (3_000_000 if activations == "keep" else 4_000_000),
        "peak_bytes": peak,
        "peak_bytes_predicted": int(peak * (1 + 0.08 * (noise.random() - 0.4))),
        "peak_phase": "optimizer" if depth == 2 else "backward",
        "param_bytes": params,
        "optimizer_bytes": 2 * params,
        "peak_grad_bytes": grads,
        "peak_activation_bytes": kept,
        "peak_workspace_bytes": work,
        "activation_bytes": kept + 4 * depth,
        "recompute_max_abs": None if activations == "keep" else 1e-7 * (1 + replicate),
        "rebuild_error_by_level": [1e-7 * (1 + replicate), 3e-7 * depth, 2e-7]
        if activations == "reversible"
        else None,
        "nll_by_position": None,
        "perplexity": None,
    }
    return record(variant, depth=depth, replicate=replicate, **{**values, **other})


def strategies() -> list[Record]:
    found = [
        strategy(variant, activations, depth, replicate)
        for variant, activations, depth, replicate in itertools.product(
            ("dense", "longformer"), STRATEGIES, (2, 4, 8), (0, 1, 2)
        )
    ]
    # keep is missing from one replicate, and a strategy from the greatest depth of one variant.
    lost = {("dense", "keep", 8, 2), *(("longformer", "selective", 8, r) for r in (0, 1, 2))}
    kept = [r for r in found if (r.variant, r.activations, r.depth, r.replicate) not in lost]
    return [*kept, failed("oom", "too big", variant="dense", depth=8, replicate=2, activations="keep")]


def payoff(variant: str, activations: str, replicate: int, batch: int, **other: Any) -> Record:
    """Measured at the largest batch that fits."""
    values: dict[str, Any] = {
        "budget_bytes": BUDGET,
        "batch_size": batch,
        "largest_batch_size": batch,
        "tokens_per_second": 1000.0 * batch**0.5 * (1 + 0.1 * replicate * (activations != "keep")),
    }
    return strategy(variant, activations, 4, replicate, **{**values, **other})


def payoffs() -> list[Record]:
    batches = {"keep": 4, "checkpoint": 16, "reversible": 25}
    found = [
        payoff(variant, activations, replicate, batch)
        for variant in ("dense", "longformer")
        for activations, batch in batches.items()
        for replicate in (0, 1, 2)
        if (variant, activations) != ("longformer", "keep")
    ]
    nothing = failed(
        "predicted_oom", "one sequence is predicted to need 9 bytes", variant="longformer", depth=4
    )
    nothing.batch_size, nothing.largest_batch_size, nothing.budget_bytes = 0, 0, BUDGET
    # One that stopped before it said its budget.
    early = failed("unsupported", "not causal", variant="chunked", depth=4, activations="keep")
    early.batch_size = 0
    nothing.cell_id, early.cell_id = "nothing", "early"
    return [*found, nothing, early]


def text_of(folder: Path, found: Sequence[Record], *, plots: bool = False) -> str:
    return (build(write(folder, found), plots=plots) / "summary.md").read_text()


def look(frame: pd.DataFrame) -> Look:
    return Look(styles(zip(frame["variant"], frame["label"], strict=True)), "setting", "footer")


def frame_of(folder: Path, found: Sequence[Record]) -> pd.DataFrame:
    return collect(write(folder, found)).frame


def median_ratio(
    found: Sequence[Record], figure: Callable[[Record], float], variant: str, strategy: str, depth: int
) -> float:
    """The median over replicates of a figure over that of keep in the same replicate, one by one."""
    at = {
        (r.activations, r.replicate): figure(r)
        for r in found
        if r.status == "ok" and (r.variant, r.depth) == (variant, depth)
    }
    pairs = [(value, at.get(("keep", rep))) for (own, rep), value in at.items() if own == strategy]
    return statistics.median(value / kept for value, kept in pairs if kept)


def test_recomputation_is_paired_with_keep_within_a_replicate(tmp_path: Path) -> None:
    found = strategies()
    part = part_of(tmp_path / "e", found, "memory")
    rows = table(part.text, "### Cost of recomputation")
    expected = {(v, s) for v in ("dense", "longformer") for s in STRATEGIES} - {("longformer", "selective")}
    assert [(r["variant"], r["activations"]) for r in rows] == [
        (v, s) for v in ("dense", "longformer") for s in STRATEGIES if (v, s) in expected
    ]
    assert "length 512, depth 8" in part.text.split("### Cost of recomputation")[1]
    cells = part.files()["recomputation"]
    assert len(cells) == 2 * 5 * 3 - 1
    figures: dict[str, Callable[[Record], float]] = {
        "flops_executed_ratio": lambda r: float(r.flops_executed_step or 0),
        "step_seconds_ratio": lambda r: float(r.step_seconds_median or 0),
        "peak_bytes_ratio": lambda r: float(r.peak_bytes or 0),
        "activation_bytes_ratio": lambda r: float(r.activation_bytes or 0),
    }
    for _, cell in cells.iterrows():
        for column, figure in figures.items():
            ratio = median_ratio(found, figure, cell["variant"], cell["activations"], cell["depth"])
            assert cell[column] == pytest.approx(ratio, rel=1e-12)
    # The median of ratios is not the ratio of medians in these records, so pairing shows.
    dense = cells[(cells.variant == "dense") & (cells.depth == 8)].set_index("activations")
    unpaired = dense.loc["sqrt", "step_seconds_median"] / dense.loc["keep", "step_seconds_median"]
    assert dense.loc["sqrt", "step_seconds_ratio"] != pytest.approx(unpaired, rel=1e-3)


def test_the_worst_errors_of_a_strategy_are_shown(tmp_path: Path) -> None:
    found = strategies()
    cells = table(part_of(tmp_path / "e", found, "memory").text, "### Cost of recomputation")
    rows = {(r["variant"], r["activations"]): r for r in cells}
    assert rows["dense", "reversible"]["rebuild error"] == "2.4e-06"
    assert rows["dense", "checkpoint"]["rebuild error"] == "–"
    assert rows["dense", "checkpoint"]["gradient error"] == "3.0e-07"
    assert rows["dense", "keep"]["gradient error"] == "–"


def test_a_rebuild_error_that_is_not_finite_is_the_worst(tmp_path: Path) -> None:
    found = [strategy("dense", "keep", 2)]
    found.append(strategy("dense", "reversible", 2, rebuild_error_by_level=[1e-7, math.inf]))
    rows = table(part_of(tmp_path / "e", found, "memory").text, "### Cost of recomputation")
    assert rows[1]["rebuild error"] == "inf"


def test_one_strategy_has_no_cost_of_recomputation(tmp_path: Path) -> None:
    found = [strategy("dense", "keep", depth) for depth in (2, 4)]
    part = part_of(tmp_path / "e", found, "memory")
    assert "Cost of recomputation" not in part.text
    assert "recomputation" not in part.files()


def bars(axis: Axes) -> dict[float, list[tuple[float, float]]]:
    """Each bar of a panel by its place: its pieces from left to right, each with its left end."""
    found: dict[float, list[tuple[float, float]]] = {}
    for patch in axis.patches:
        assert isinstance(patch, Rectangle)
        middle = round(patch.get_y() + patch.get_height() / 2, 6)
        found.setdefault(middle, []).append((patch.get_x(), patch.get_width()))
    return found


def test_the_waterfall_adds_up_to_the_peak(tmp_path: Path) -> None:
    found = strategies()
    frame = frame_of(tmp_path / "e", found)
    with canvas.look():
        figure = memory_plots.waterfall(memory.peak_parts(frame), look(frame))
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["dense", "longformer"]
    for axis in figure.axes:
        drawn = bars(axis)
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        words = {t.get_position()[1]: t.get_text() for t in axis.texts}
        own = [r for r in found if r.status == "ok" and r.variant == axis.get_title() and r.depth == 8]
        assert {names[int(place)] for place in drawn} == {r.activations for r in own}
        for place, pieces in drawn.items():
            same = [r for r in own if r.activations == names[int(place)]]
            expected = [statistics.mean(getattr(r, part) for r in same) for part in PARTS]
            assert [width for _, width in pieces] == pytest.approx(expected)
            assert [left for left, _ in pieces] == pytest.approx([0, *itertools.accumulate(expected)][:-1])
            peak = statistics.mean(r.peak_bytes or 0 for r in same)
            assert sum(expected) == pytest.approx(peak)
            size, phase = words[place].split(", ")
            assert number(size) == pytest.approx(peak, rel=6e-3)
            assert phase == "backward"


def test_one_strategy_has_a_bar_a_variant(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", [strategy(v, "keep", d) for v in ("dense", "chunked") for d in (2, 4)])
    figure = memory_plots.waterfall(memory.peak_parts(frame), look(frame))
    assert figure is not None
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["dense", "chunked"]
    assert len(bars(axis)) == 2


def test_a_planned_peak_says_that_it_is_predicted(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", [strategy("dense", "keep", 2, peak_bytes_source="predicted")])
    figure = memory_plots.waterfall(memory.peak_parts(frame), look(frame))
    assert figure is not None
    assert "ᵖ" in figure.axes[0].texts[0].get_text()


def test_records_without_the_parts_have_no_waterfall(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", [record()])
    assert memory_plots.waterfall(memory.peak_parts(frame), look(frame)) is None


@pytest.mark.parametrize(
    ("draw", "figure_of"),
    [
        (memory_plots.activations_by_depth, "activation_bytes"),
        (memory_plots.peak_by_depth, "peak_bytes"),
    ],
)
def test_lines_over_depth_are_the_medians(
    tmp_path: Path, draw: Callable[[pd.DataFrame, Look], Figure | None], figure_of: str
) -> None:
    found = [r for r in strategies() if r.status == "ok"]
    frame = frame_of(tmp_path / "e", found)
    figure = draw(cost_cells(frame), look(frame))
    assert figure is not None
    for axis in figure.axes:
        own = [r for r in found if r.variant == axis.get_title()]
        expected = []
        for activations in sorted({r.activations for r in own}):
            same = [r for r in own if r.activations == activations]
            at = {d: [getattr(r, figure_of) for r in same if r.depth == d] for d in (2, 4, 8)}
            expected.append([(d, statistics.median(values)) for d, values in at.items() if values])
        drawn = [
            [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())] for line in axis.get_lines()
        ]
        assert sorted(drawn) == sorted(expected)


def test_two_depths_make_no_line_over_depth(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", [strategy("dense", s, d) for s in STRATEGIES for d in (2, 4)])
    assert memory_plots.peak_by_depth(cost_cells(frame), look(frame)) is None


def test_predictions_over_depth_are_hollow(tmp_path: Path) -> None:
    found = [strategy("dense", "keep", d) for d in (2, 4, 8)]
    lost = failed("predicted_oom", "8 GiB", variant="dense", depth=16)
    lost.peak_bytes_predicted = 5_000_000
    frame = frame_of(tmp_path / "e", [*found, lost])
    figure = memory_plots.peak_by_depth(cost_cells(frame), look(frame))
    assert figure is not None
    lines = figure.axes[0].get_lines()
    by_colour = {str(line.get_markerfacecolor()): np.asarray(line.get_xydata()).tolist() for line in lines}
    assert by_colour["white"] == [[16, 5_000_000]]


def test_what_libraries_keep_is_no_error_of_a_prediction(tmp_path: Path) -> None:
    sizes = {"peak_bytes": 1_100_000, "peak_bytes_predicted": 950_000, "peak_bytes_source": "cuda_allocated"}
    frame = frame_of(tmp_path / "e", [strategy("dense", "keep", 4, library_bytes=100_000, **sizes)])
    assert memory.prediction_errors(frame)["error"].tolist() == pytest.approx([-0.05])


def test_prediction_errors_over_all_measured_cells(tmp_path: Path) -> None:
    found = [*strategies(), *payoffs(), strategy("dense", "keep", 32, peak_bytes_source="predicted")]
    text = part_of(tmp_path / "e", found, "memory").text
    measured = [
        r for r in found if r.status == "ok" and r.peak_bytes and r.peak_bytes_source == "live_storage"
    ]
    rows = table(text, "### Prediction against measurement")

    def errors(variant: str, activations: str) -> list[float]:
        return [
            (r.peak_bytes_predicted or 0) / (r.peak_bytes or 1) - 1
            for r in measured
            if variant in ("all", r.variant) and activations in ("all", r.activations)
        ]

    def percent(cell: str) -> float:
        return float(cell.removesuffix(" %")) / 100

    assert [(r["variant"], r["activations"]) for r in rows] == [
        ("all", "all"),
        *((v, s) for v in ("dense", "longformer") for s in STRATEGIES),
    ]
    for row in rows:
        own = errors(row["variant"], row["activations"])
        sizes = sorted(abs(e) for e in own)
        place = 0.95 * (len(sizes) - 1)
        low, high = sizes[math.floor(place)], sizes[math.ceil(place)]
        assert int(row["cells"]) == len(own)
        assert percent(row["median error"]) == pytest.approx(statistics.median(sizes), rel=6e-3)
        p95 = low + (high - low) * (place % 1)
        assert percent(row["95th percentile"]) == pytest.approx(p95, rel=6e-3)
        assert percent(row["largest"]) == pytest.approx(max(own, key=abs), rel=6e-3)


def test_cells_that_were_predicted_badly_are_named(tmp_path: Path) -> None:
    found = [
        strategy("dense", "keep", 2, peak_bytes=1000, peak_bytes_predicted=1049),
        strategy("dense", "sqrt", 2, peak_bytes=1000, peak_bytes_predicted=900),
        strategy("longformer", "sqrt", 4, peak_bytes=1000, peak_bytes_predicted=1060),
    ]
    named = table(part_of(tmp_path / "e", found, "memory").text, "Further off than 5%:")
    assert [(r["variant"], r["activations"], r["depth"], r["error"]) for r in named] == [
        ("dense", "sqrt", "2", "-10.0 %"),
        ("longformer", "sqrt", "4", "6.00 %"),
    ]
    fine = part_of(tmp_path / "fine", found[:1], "memory").text
    assert "No cell is off by more than 5%." in fine


def test_feed_forward_layers_and_depth_schedules_are_never_mixed(tmp_path: Path) -> None:
    """Nor layers of one name with other knobs. What an older record does not say is what its peers say."""
    slots = [
        {"feed_forward_params": {"mult": 4}},
        {"feed_forward_params": {"mult": 8}},
        {"feed_forward": "glu", "feed_forward_params": {"activation": "silu", "mult": 4}},
        {"feed_forward_params": {"mult": 4}, "stack": "universal"},
    ]
    names = ["mlp (mult=4)", "mlp (mult=8)", "glu", "mlp (mult=4)"]
    schedules = ["stack", "stack", "stack", "universal"]
    found = [
        record(cell_id=f"c{n}-{r}", replicate=r, step_seconds_median=float(n), params=1000 * n, **slot)
        for n, slot in enumerate(slots, 1)
        for r in range(2)
    ]
    part = part_of(tmp_path / "e", found, "cells", "parameters")
    text, summary = part.text, part.files()["summary"]
    keys = ["feed_forward_layer", "depth_schedule"]
    want = {pair: float(n) for n, pair in enumerate(zip(names, schedules, strict=True), 1)}
    assert summary.set_index(keys).step_seconds_median.to_dict() == want
    assert (summary.step_seconds_ratio.dropna() == 1).all(), "each beside dense with the same slots"
    assert "feed-forward glu" in text
    assert "universal" in text
    parameters = table(text, "## Parameters")
    assert sorted(row["parameters"] for row in parameters) == ["1,000", "2,000", "3,000", "4,000"]

    older = [record(cell_id="old", feed_forward_params=None), record(cell_id="new", replicate=1, **slots[0])]
    (row,) = part_of(tmp_path / "old", older, "cells").files()["summary"].to_dict("records")
    assert (row["feed_forward_layer"], row["depth_schedule"], row["replicates"]) == ("mlp", "stack", 2)


def test_a_run_of_an_older_version_is_compared_with_a_new_one(tmp_path: Path) -> None:
    """It does not say how wide its MLP was; the other run does."""
    runs = [
        collect(write(tmp_path / str(n), [record(feed_forward_params=knobs)]))
        for n, knobs in enumerate([None, {"mult": 4}])
    ]
    both = relabelled(pd.concat([run.frame for run in runs], ignore_index=True))
    assert both.feed_forward_layer.tolist() == ["mlp", "mlp"]
    assert both.feed_forward_json.nunique(dropna=False) == 1


def test_ff_chunks_are_never_mixed(tmp_path: Path) -> None:
    found = [record(cell_id=f"c{c}", ff_chunks=c, step_seconds_median=float(c)) for c in (1, 8)]
    part = part_of(tmp_path / "e", found, "cells")
    summary = part.files()["summary"]
    assert summary.set_index("ff_chunks").step_seconds_median.to_dict() == {1: 1.0, 8: 8.0}
    assert "feed-forward in 8 pieces" in part.text
