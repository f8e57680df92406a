"""A round that the host bounds: its cells are compared by the time of the device."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_parts import part_of
from test_report import record, table, write

from bench.claims.cells import ratio, step_time
from bench.records import Record
from bench.report import build, compare
from bench.report.data.collect import collect
from bench.report.data.compared_time import with_compared_time
from bench.report.data.noise_floor import floors, measurements, noises, pairs
from bench.report.summary import tex
from bench.report.text.marks import LAUNCH_BOUND

WALL = 0.4
BUSY = {"dense": 1e-8, "longformer": 2.5e-8, "chunked": 5e-9}
"""Device seconds of a step are this times the length squared: the wall time says nothing of it."""
LENGTHS = (512, 1024, 2048, 4096)


def round_of(*, busy: bool = True, **other: object) -> list[Record]:
    found = []
    for replicate in range(3):
        for seq_len in LENGTHS:
            for variant, rate in BUSY.items():
                device = rate * seq_len**2 * (1 + 0.001 * replicate)
                times = {"device_seconds_step": device, "launch_bound": device < 0.9 * WALL}
                where = {"replicate": replicate, "seq_len": seq_len, "variant": variant}
                found.append(
                    record(
                        **where,
                        cell_id=f"{variant}-{seq_len}-{replicate}",
                        device="cuda",
                        device_name="Example GPU",
                        step_seconds_median=WALL,
                        tokens_per_second=seq_len / WALL,
                        **(times if busy else {}),
                        **other,
                    )
                )
    return found


def report_of(folder: Path, found: list[Record]) -> tuple[str, pd.DataFrame]:
    report = build(write(folder, found), plots=False)
    return (report / "summary.md").read_text(), pd.read_csv(report / "summary.csv")


def test_equal_wall_times_are_ranked_by_the_device(tmp_path: Path) -> None:
    part = part_of(tmp_path / "demo", round_of(), "cells")
    text, summary = part.text, part.files()["summary"]
    at = summary[summary.seq_len == 1024].set_index("variant")
    assert at.step_seconds_ratio.to_list() == [1.0, 1.0, 1.0]
    assert at.compared_seconds_ratio.to_dict() == pytest.approx(
        {"dense": 1.0, "longformer": 2.5, "chunked": 0.5}
    )
    assert (at.time_source == "device").all()
    assert (
        at.differs.to_dict() == {"dense": True, "longformer": True, "chunked": True}
        or at.differs.isna()["dense"]
    )
    assert at.compared_tokens_per_second_median["dense"] == pytest.approx(1024 / (1.001 * 1e-8 * 1024**2))
    rows = {row["variant"]: row for row in table(text, "## Cost") if row["length"] == "1024"}
    assert rows["longformer"]["time / dense"].startswith("2.5")
    assert rows["chunked"]["time / dense"].startswith("0.5")
    assert rows["dense"]["wall time"].endswith(LAUNCH_BOUND)
    assert "device time" in rows["dense"]
    assert "step time" not in rows["dense"]
    assert f"{LAUNCH_BOUND} launch-bound" in text
    assert "times compared: the device's, not wall-clock: Example GPU" in text
    assert "of the device" in tex(part.results)


@pytest.mark.slow
def test_growth_crossovers_and_the_page_follow(tmp_path: Path) -> None:
    """Wall times do not grow here; the device's grow as T². `chunked` is always cheaper."""
    text, _ = report_of(tmp_path / "demo", round_of())
    growth = text.split("## Growth")[1].split("\n## ")[0]
    assert re.search(r"\| dense +\|.*\| +2\.00 \|", growth), growth
    crossover = text.split("## Crossover")[1].split("\n## ")[0]
    assert re.search(r"\| chunked .*(always|at all|from)", crossover), crossover
    page = (tmp_path / "demo/report/index.html").read_text()
    assert "wall time" in page


@pytest.mark.slow
def test_one_record_without_device_time_has_all_compared_by_wall_time(tmp_path: Path) -> None:
    """Two kinds of time are never divided; the wall times that are the host's are marked."""
    mixed = [*round_of()[:-1], *round_of(busy=False)[-1:]]
    text, summary = report_of(tmp_path / "demo", mixed)
    assert (summary.time_source == "wall").all()
    assert (summary.compared_seconds_median == WALL).all()
    rows = {row["variant"]: row for row in table(text, "## Cost") if row["length"] == "1024"}
    assert rows["dense"]["step time"].endswith(LAUNCH_BOUND)
    assert "wall time" not in rows["dense"]
    assert "times compared" not in text


@pytest.mark.slow
def test_without_device_times_nothing_is_said_of_them(tmp_path: Path) -> None:
    text, summary = report_of(tmp_path / "demo", round_of(busy=False))
    assert (summary.compared_seconds_median == summary.step_seconds_median).all()
    assert (summary.compared_tokens_per_second_ratio == summary.tokens_per_second_ratio).all()
    assert LAUNCH_BOUND not in text
    assert "device time" not in text


def test_a_failed_cell_has_no_part_in_the_choice(tmp_path: Path) -> None:
    lost = record(cell_id="lost", seq_len=8192, device="cuda", device_name="Example GPU", status="timeout")
    summary = part_of(tmp_path / "demo", [*round_of(), lost], "cells").files()["summary"]
    assert (summary.time_source == "device").all()


def test_machines_choose_apart(tmp_path: Path) -> None:
    other = [
        record(variant=v, cell_id=f"cpu-{v}", step_seconds_median=s)
        for v, s in (("dense", 1.0), ("chunked", 3.0))
    ]
    summary = part_of(tmp_path / "demo", [*round_of(), *other], "cells").files()["summary"]
    sources = summary.groupby("device").time_source.unique()
    assert [*sources["cuda"]] == ["device"]
    assert [*sources["cpu"]] == ["wall"]
    assert summary[summary.device == "cpu"].compared_seconds_ratio.to_list() == [1.0, 3.0]


def test_the_noise_floor_is_of_the_time_that_is_compared(tmp_path: Path) -> None:
    """Twins whose wall times differ by a half, and whose device times by 1 %."""
    twins = [
        record(
            cell_id=f"{replicate}-{twin}",
            replicate=replicate,
            twin=twin,
            device="cuda",
            device_name="Example GPU",
            step_seconds_median=WALL * (1 + 0.5 * twin),
            device_seconds_step=0.1 * (1 + 0.01 * twin),
        )
        for replicate in range(3)
        for twin in range(2)
    ]
    every = collect(write(tmp_path / "demo", twins)).every
    assert pairs(measurements(every)).log_ratio.to_list() == pytest.approx([np.log(1.01)] * 3)
    (floor,) = floors(noises(every)).values()
    assert 0.01 < floor < np.log(1.5), "of three pairs the bound is far above the estimate"


def test_two_runs_are_compared_by_the_time_that_both_have(tmp_path: Path) -> None:
    for name, busy in (("a", True), ("b", True), ("c", False)):
        write(tmp_path / name, round_of(busy=busy))
    both = (compare(tmp_path / "a", tmp_path / "b", plots=False) / "compare.md").read_text()
    assert "device time, first" in both
    one = (compare(tmp_path / "a", tmp_path / "c", plots=False) / "compare.md").read_text()
    assert "step time, first" in one


def test_the_column_is_null_where_nothing_was_timed() -> None:
    frame = pd.DataFrame(
        {
            "status": ["ok", "ok"],
            "device": "cuda",
            "machine": "m",
            "step_seconds_median": [np.nan, np.nan],
            "device_seconds_step": [np.nan, np.nan],
            "tokens_per_second": [np.nan, np.nan],
        }
    )
    found = with_compared_time(frame)
    assert found.compared_seconds.isna().all()
    assert (found.time_source == "wall").all()


def test_claims_are_judged_by_the_time_that_both_have(tmp_path: Path) -> None:
    frame = collect(write(tmp_path / "demo", round_of())).frame
    dense, chunked = (frame[frame.variant == name] for name in ("dense", "chunked"))
    assert ratio(chunked, dense, step_time(chunked, dense)).middle == pytest.approx(0.5)
    older = dense.assign(device_seconds_step=np.nan)
    assert ratio(chunked, older, step_time(chunked, older)).middle == 1.0
