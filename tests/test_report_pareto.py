"""Quality against cost: no model dominates one of a front, among those trained on equally many tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_parts import part_of
from test_report import record, table
from test_report_memory import frame_of, look

from bench.records import Record
from bench.report.data.statistics import cost_cells, quality_cells, summary
from bench.report.sections.pareto import plots as pareto_plots
from bench.report.sections.pareto.data import COSTS, pareto_cells

VARIANTS = ("dense", "chunked", "overlapping", "longformer")


def model(variant: str, nll: float, seconds: float, replicate: int = 0, **other: Any) -> Record:
    values: dict[str, Any] = {
        "cell_id": f"{variant}-{replicate}-{nll}-{seconds}-{sorted(other.items())}",
        "variant_params": {},
        "nll": nll,
        "step_seconds_median": seconds,
        "peak_bytes": 1000,
        "flops_executed_step": 10**6,
    }
    return record(variant, replicate=replicate, **{**values, **other})


def pareto_of(frame: pd.DataFrame) -> pd.DataFrame:
    return pareto_cells(summary(cost_cells(frame), quality_cells(frame)))


def fronts(folder: Path, found: list[Record], cost: str = "time") -> dict[str, str]:
    cells = pareto_of(frame_of(folder, found))
    return dict(zip(cells["label"], cells[f"{cost}_front"], strict=True))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The summary of four models."""
    frame = frame_of(tmp_path_factory.mktemp("four"), [model(name, 1.0, 1.0) for name in VARIANTS])
    return (
        summary(cost_cells(frame), quality_cells(frame)).set_index("label").loc[list(VARIANTS)].reset_index()
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=4, max_size=4))
def test_nothing_beats_the_front_and_all_else_is_beaten(
    four: pd.DataFrame, points: list[tuple[int, int]]
) -> None:
    places = dict(zip(VARIANTS, points, strict=True))
    nll, seconds = ([float(point[axis]) for point in points] for axis in (0, 1))
    cells = pareto_cells(four.assign(nll_mean=nll, bits_per_byte_mean=nll, compared_seconds_median=seconds))

    def beaten(name: str) -> bool:
        own = places[name]
        return any(other[0] <= own[0] and other[1] <= own[1] and other != own for other in places.values())

    marks = dict(zip(cells["label"], cells["time_front"], strict=True))
    assert marks == {name: "" if beaten(name) else "front" for name in VARIANTS}


def test_accuracy_is_better_where_it_is_higher(tmp_path: Path) -> None:
    task = {"objective": "recall", "data": "mqar"}
    found = [
        model("dense", 1.0, 2.0, accuracy=0.9, **task),
        model("chunked", 2.0, 1.0, accuracy=0.5, **task),
        model("longformer", 0.5, 2.5, accuracy=0.8, **task),
    ]
    assert fronts(tmp_path, found) == {"dense": "front", "chunked": "front", "longformer": ""}


def test_what_sees_the_future_is_on_no_front_and_keeps_nobody_off(tmp_path: Path) -> None:
    found = [model("dense", 2.0, 2.0), model("chunked", 1.0, 1.0, leak_max_abs=1.0)]
    assert fronts(tmp_path, found) == {"dense": "front", "chunked": ""}


def test_better_within_the_intervals_is_not_clear(tmp_path: Path) -> None:
    """chunked is better in both medians; its times overlap dense's, those of longformer do not."""
    seconds = {"dense": (1.0, 1.1, 1.2), "chunked": (0.9, 1.05, 1.3), "longformer": (3.0, 3.1, 3.2)}
    nll = {"dense": 2.0, "chunked": 1.9, "longformer": 2.5}
    found = [
        model(name, nll[name] + 0.01 * replicate, time, replicate)
        for name, times in seconds.items()
        for replicate, time in enumerate(times)
    ]
    assert fronts(tmp_path, found) == {"dense": "noise", "chunked": "front", "longformer": ""}


def test_only_models_trained_on_equally_many_tokens_stand_together(tmp_path: Path) -> None:
    apart = [model("dense", 2.0, 2.0), model("chunked", 1.0, 1.0, tokens_trained=999)]
    assert pareto_of(frame_of(tmp_path / "tokens", apart)).empty
    untrained = [model(name, 2.0, 2.0, tokens_trained=None) for name in VARIANTS]
    assert pareto_of(frame_of(tmp_path / "none", untrained)).empty
    lengths = [model("dense", 2.0, 2.0), model("chunked", 1.0, 1.0, seq_len=1024)]
    assert pareto_of(frame_of(tmp_path / "length", lengths)).empty


def test_a_model_stands_at_its_best_rate(tmp_path: Path) -> None:
    rates = {0.01: 3.0, 0.003: 1.5, 0.001: 2.0}
    found = [
        model(name, nll + (name == "dense"), 1.0, learning_rate=rate, measure="search")
        for name in ("dense", "chunked")
        for rate, nll in rates.items()
    ]
    cells = pareto_of(frame_of(tmp_path, found))
    assert list(cells["learning_rate"]) == [0.003, 0.003]
    assert list(cells["quality"]) == pytest.approx([2.5 / math.log(2), 1.5 / math.log(2)])


def test_ways_of_saving_activations_stand_beside_each_other(tmp_path: Path) -> None:
    found = [
        model("dense", 2.0, 1.0, peak_bytes=1000, activations="keep"),
        model("dense", 2.0, 1.5, peak_bytes=100, activations="reversible"),
    ]
    cells = pareto_of(frame_of(tmp_path, found)).set_index("activations")
    assert list(cells.index) == ["keep", "reversible"]
    assert list(cells["time_front"]) == ["front", ""]
    assert list(cells["memory_front"]) == ["", "front"]


def several() -> list[Record]:
    return [
        model(name, 2.0 + 0.1 * place + 0.01 * replicate, 4.0 - place + 0.01 * replicate, replicate)
        for place, name in enumerate(VARIANTS)
        for replicate in (0, 1, 2)
    ]


def test_the_table_names_the_fronts(tmp_path: Path) -> None:
    text = part_of(tmp_path, several(), "pareto").text.split("## Pareto fronts", 1)[1]
    rows = table(text, "### clm, data plays, length 512, depth 2")
    assert [row["variant"] for row in rows] == list(VARIANTS)
    assert rows[0]["bits per byte"] == "2.900 (2.864 – 2.936)"
    assert rows[0]["on the front of"] == "time, memory, FLOPs"
    assert {row["on the front of"] for row in rows[1:]} == {"time"}


def test_the_picture_draws_the_front_through_its_models(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, several())
    figure = pareto_plots.pareto(pareto_of(frame), look(frame))
    assert figure is not None
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert len(axes) == len(COSTS)
    (front,) = [line for line in axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
    assert sorted(front.get_xdata()) == pytest.approx([1.01, 2.01, 3.01, 4.01])  # type: ignore[arg-type]
    assert pareto_plots.pareto(pd.DataFrame(), look(frame)) is None
