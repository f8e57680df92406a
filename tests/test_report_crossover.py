"""Where a variant becomes cheaper than dense: planted crossings are found, doubt and quality beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from report_parts import part_of
from test_report import record, table
from test_report_memory import frame_of, look

from bench.records import Record
from bench.report.data.crossing import FIGURES, crossing
from bench.report.data.statistics import cost_cells
from bench.report.sections.crossover import plots as crossover_plots
from bench.report.sections.crossover.data import compared, crossovers, quality_loss

LENGTHS = (512, 1024, 2048, 4096, 8192)


def pair(
    seq_len: int,
    ratio: float,
    replicate: int = 0,
    *,
    slow: float = 1.0,
    variant: str = "chunked",
    **other: Any,
) -> list[Record]:
    """A dense cell and another, whose time is `ratio` of dense's; `slow` is how slow the machine was."""
    dense = 1e-3 * seq_len * slow
    known: dict[str, Any] = {
        "peak_bytes": 10**6 * seq_len,
        "flops_executed_step": 10**6 * seq_len,
        "nll": None,
        "perplexity": None,
    }
    cells = []
    for name, seconds in (("dense", dense), (variant, dense * ratio)):
        cell_id = f"{name}-{seq_len}-{replicate}-{len(other)}"
        values = {**known, "cell_id": cell_id, "step_seconds_median": seconds, "variant_params": {}, **other}
        cells.append(record(name, seq_len, replicate=replicate, **values))
    return cells


def crossing_at(place: float, *factors: float, slope: float = 1.0) -> list[Record]:
    """Pairs whose ratio is factor · (place / T)^slope, one factor a replicate, on a machine that drifts."""
    return [
        one
        for replicate, factor in enumerate(factors or (1.0,))
        for seq_len in LENGTHS
        for one in pair(seq_len, factor * (place / seq_len) ** slope, replicate, slow=1 + 0.7 * replicate)
    ]


def found_in(folder: Path, found: list[Record]) -> dict[str, Any]:
    """The crossovers of the one variant, by figure."""
    frame = frame_of(folder, found)
    cells = crossovers(cost_cells(frame), quality_loss(frame))
    return {row["figure"]: row for _, row in cells.iterrows()}


def compared_of(frame: pd.DataFrame) -> pd.DataFrame:
    return compared(cost_cells(frame))


# --- one line -------------------------------------------------------------------------------------


@given(place=st.floats(520, 8000), slope=st.floats(0.2, 3))
def test_a_planted_crossing_is_found(place: float, slope: float) -> None:
    outcome, at = crossing(LENGTHS, [(place / length) ** slope for length in LENGTHS])
    assert outcome == "from"
    assert at == pytest.approx(place, rel=2e-3 / slope)
    outcome, at = crossing(LENGTHS, [(length / place) ** slope for length in LENGTHS])
    assert outcome == "until"
    assert at == pytest.approx(place, rel=2e-3 / slope)


@pytest.mark.parametrize(
    ("ratios", "want"),
    [
        ([2.0, 2.0, 2.0, 2.0, 2.0], ("never", 8192)),
        ([1.0, 1.0, 1.0, 1.0, 1.0], ("never", 8192)),
        ([0.9999, 1.0, 1.0, 1.0, 1.0], ("never", 8192)),
        ([0.5, 0.9, 0.5, 0.1, 0.9], ("always", 512)),
        ([1.0, 1.0, 0.5, 0.5, 0.5], ("from", 1024)),
        ([0.5, 2.0, 2.0, 1.0, 0.5], ("from", 4096)),
        ([2.0, 0.5, 2.0, 2.0, 2.0], ("until", math.sqrt(1024 * 2048))),
        ([4.0, 4.0, 2.0, 0.5, 0.5], ("from", math.sqrt(2048 * 4096))),
    ],
)
def test_the_last_crossing_counts(ratios: list[float], want: tuple[str, float]) -> None:
    outcome, at = crossing(LENGTHS, ratios)
    assert outcome == want[0]
    assert at == pytest.approx(want[1])


def test_one_length_is_an_answer_too() -> None:
    assert crossing([512], [0.5]) == ("always", 512)
    assert crossing([512], [1.5]) == ("never", 512)


# --- over replicates ------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_replicate(tmp_path: Path) -> None:
    """The second replicate ran on a machine almost twice as slow: the ratio is not moved by it."""
    time = found_in(tmp_path, crossing_at(1500.0, 1.0, 1.0))["time"]
    assert time["length"] == pytest.approx(1500)
    assert (time["low"], time["high"]) == (pytest.approx(1500), pytest.approx(1500))


def test_the_interval_holds_the_crossings_of_the_replicates(tmp_path: Path) -> None:
    """Two replicates without a noise floor say little; five that spread as much say more."""
    two = found_in(tmp_path / "two", crossing_at(1500.0, 0.9, 1.2))["time"]
    assert two["length"] == pytest.approx(1500 * (0.9 + 1.2) / 2)
    assert two["low"] < 1500 * 0.9 < 1500 * 1.2 < two["high"]
    five = found_in(tmp_path / "five", crossing_at(1500.0, 0.9, 1.0, 1.05, 1.1, 1.2))["time"]
    assert two["low"] < five["low"] < five["length"] < five["high"] < two["high"]


def test_one_replicate_has_no_interval(tmp_path: Path) -> None:
    time = found_in(tmp_path, crossing_at(1500.0))["time"]
    assert time["length"] == pytest.approx(1500)
    assert math.isnan(time["low"])
    assert math.isnan(time["high"])


@pytest.mark.slow
def test_an_interval_may_reach_beyond_what_was_measured(tmp_path: Path) -> None:
    time = found_in(tmp_path / "late", crossing_at(7000.0, 0.9, 1.0, 1.5))["time"]
    assert (time["outcome"], time["high"]) == ("from", math.inf)
    time = found_in(tmp_path / "early", crossing_at(560.0, 0.5, 1.0, 1.1))["time"]
    assert (time["outcome"], time["low"]) == ("from", 0)


def test_what_costs_the_same_is_never_cheaper(tmp_path: Path) -> None:
    found = found_in(tmp_path, crossing_at(1500.0, 1.0, 1.1))
    assert (found["memory"]["outcome"], found["flops"]["outcome"]) == ("never", "never")
    assert (found["memory"]["last"], found["memory"]["lengths"]) == (8192, len(LENGTHS))


@pytest.mark.slow
def test_only_like_is_compared_with_like(tmp_path: Path) -> None:
    """Another batch, depth or way of saving activations has no dense beside it."""
    for number, other in enumerate(({"batch_size": 9}, {"activations": "checkpoint"}, {"depth": 7})):
        alone = [one for one in crossing_at(1500.0) if one.variant == "dense"]
        stranger = record("chunked", 1024, other.get("depth", 2), variant_params={}, cell_id="stranger")
        for key, value in other.items():
            setattr(stranger, key, value)
        assert compared_of(frame_of(tmp_path / str(number), [*alone, stranger])).empty


def test_unfinished_cells_are_not_compared(tmp_path: Path) -> None:
    found = crossing_at(1500.0)
    for one in found:
        if one.seq_len == 8192 and one.variant == "dense":
            one.status = "oom"
    assert found_in(tmp_path, found)["time"]["last"] == 4096


# --- the quality beside it ------------------------------------------------------------------------


def trained(variant: str, seq_len: int, replicate: int, nll: float, **other: Any) -> Record:
    values: dict[str, Any] = {
        "cell_id": f"trained-{variant}-{seq_len}-{replicate}-{other}",
        "measure": "trained",
        "variant_params": {},
        "d_model": 32,
        "depth": 1,
        "nll": nll,
        "learning_rate": 0.003,
    }
    chosen = {**values, **other}
    return record(variant, seq_len, chosen.pop("depth"), replicate, **chosen)


def qualities() -> list[Record]:
    return [
        trained(variant, seq_len, replicate, 2.0 + 0.3 * replicate + lost, **other)
        for replicate, extra in ((0, 0.01), (1, 0.03))
        for seq_len, most in ((512, 0.9), (2048, 0.1))
        for variant, lost, other in (
            ("dense", 0.0, {}),
            ("dense", 0.5, {"learning_rate": 0.03}),
            ("chunked", most + extra, {}),
        )
    ]


def test_the_loss_is_of_the_nearest_length_and_paired(tmp_path: Path) -> None:
    """Replicates differ by 0.3 nats, what is lost by 0.02; dense is taken at its better rate."""
    time = found_in(tmp_path, [*crossing_at(1500.0), *qualities()])["time"]
    assert time["quality_seq_len"] == 2048
    assert time["nll_lost"] == pytest.approx(0.12)
    assert time["nll_lost_low"] == pytest.approx(0.11)
    assert time["nll_lost_high"] == pytest.approx(0.13)


@pytest.mark.slow
def test_what_sees_the_future_loses_nothing_worth_saying(tmp_path: Path) -> None:
    found = qualities()
    for one in found:
        if one.variant == "chunked":
            one.leak_max_abs = 1.0
    assert math.isnan(found_in(tmp_path, [*crossing_at(1500.0), *found])["time"]["nll_lost"])


@pytest.mark.parametrize(("bits", "known"), [(9.0, True), (2.5, False)])
def test_what_is_undertrained_loses_nothing_worth_saying(tmp_path: Path, bits: float, known: bool) -> None:
    found = qualities()
    for one in found:
        if one.variant == "chunked":
            one.ngram_bits_per_byte = [9.5, 9.2, bits]
    lost = found_in(tmp_path, [*crossing_at(1500.0), *found])["time"]["nll_lost"]
    assert math.isnan(lost) != known


def test_the_table_says_it_all(tmp_path: Path) -> None:
    text = part_of(tmp_path, [*crossing_at(1500.0, 0.9, 1.2), *qualities()], "crossover").text
    section = text.split("## Crossover", 1)[1].split("\n## ", 1)[0]
    (heading,) = [line for line in section.splitlines() if line.startswith("### ") and "depth 2" in line]
    (row,) = table(text.split("## Crossover", 1)[1], heading)
    assert row["variant"] == "chunked"
    assert row["lengths"] == "512–8k"
    assert row["cheaper in time"].startswith("from 1,575 on (")
    assert " to > 8k)" in row["cheaper in time"]
    assert row["in peak memory"] == "never up to 8k"
    assert row["loss over dense"] == "+0.120 (+0.110 to +0.130) at 2k, width 32, depth 1"


# --- the picture ----------------------------------------------------------------------------------


def rings(axis: Axes) -> list[tuple[float, float]]:
    found = [line for line in axis.get_lines() if line.get_fillstyle() == "none" and len(line.get_xdata())]  # type: ignore[arg-type]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in found]  # type: ignore[index,arg-type]


@pytest.mark.slow
def test_the_chart_has_a_line_at_one_and_rings_the_crossing(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, crossing_at(1500.0, 1.0, 1.1))
    cells = compared_of(frame)
    figure = crossover_plots.crossover(cells, look(frame))
    assert figure is not None
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert len(axes) == len(FIGURES)
    for axis in axes:
        assert any(list(line.get_ydata()) == [1.0, 1.0] for line in axis.get_lines())  # type: ignore[arg-type]
        low, high = axis.get_ylim()
        assert low < 1 < high
    assert rings(axes[0]) == [(pytest.approx(crossing(LENGTHS, list(cells[FIGURES["time"]]))[1]), 1.0)]
    assert rings(axes[1]) == []


@pytest.mark.slow
def test_one_length_is_no_crossover(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, pair(512, 0.5))
    assert crossovers(cost_cells(frame), quality_loss(frame)).empty
    assert crossover_plots.crossover(compared_of(frame), look(frame)) is None
