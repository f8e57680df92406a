"""What noise lets the report say: intervals over replicates, the floor from A/A pairs, and who differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_report import number, record, table, write

from bench.report import build
from bench.report.data import noise_floor
from bench.report.data.collect import collect
from bench.report.data.compared_time import with_compared_time
from bench.report.data.different import differs
from bench.report.data.intervals import interval
from bench.report.data.statistics import cost_cells
from bench.report.sections.contamination import Contamination
from bench.report.sections.cost.tables import cost
from bench.report.sections.noise import data as noise
from bench.report.sections.noise import tables as noise_tables
from bench.report.text import markdown
from bench.report.text.marks import CONTAMINATED

Floats = npt.NDArray[np.float64]
SAMPLES = Path(__file__).parent / "data" / "step_seconds.json"
QUIET = 0.015
"""Standard deviation of a process's logarithm of time on a machine that does nothing else."""
logarithms = st.floats(-3, 3, allow_subnormal=False)


# --- intervals ------------------------------------------------------------------------------------


def test_one_replicate_has_no_interval_and_two_have_their_range() -> None:
    assert all(np.isnan(end) for end in interval(np.array([0.3])))
    assert interval(np.array([0.3, 0.1])) == (0.1, 0.3)


@given(st.lists(logarithms, min_size=2, max_size=6))
def test_of_few_the_median_lies_in_the_interval(logs: list[float]) -> None:
    low, high = interval(np.array(logs))
    assert low - 1e-9 <= np.median(logs) <= high + 1e-9


@pytest.mark.parametrize("n", [3, 4, 5])
def test_a_bootstrap_of_the_median_of_few_is_their_range(n: int) -> None:
    """Why `interval` does not take it there: the range covers the median in 1 − 2 ∙ 0.5ⁿ of cases."""
    logs = np.random.default_rng(n).normal(size=n)
    found = stats.bootstrap((logs,), np.median, method="percentile", random_state=np.random.default_rng(0))
    assert found.confidence_interval == (logs.min(), logs.max())


@pytest.mark.parametrize("n", [3, 5, 12])
def test_intervals_cover_what_the_figures_are_drawn_from(n: int) -> None:
    draws = np.random.default_rng(n).normal(0.2, 0.05, size=(1500, n))
    low, high = interval(draws)
    assert np.mean((low <= 0.2) & (high >= 0.2)) == pytest.approx(0.95, abs=0.015)


@given(st.lists(logarithms, min_size=3, max_size=8), st.floats(-2, 2))
def test_a_change_of_units_moves_the_interval_along(logs: list[float], shift: float) -> None:
    plain, moved = interval(np.array(logs)), interval(np.array(logs) + shift)
    assert np.subtract(moved, shift) == pytest.approx(plain, abs=1e-9)


def test_rows_together_are_as_rows_alone() -> None:
    rows = np.random.default_rng(3).normal(size=(4, 5))
    together = np.array(interval(rows)).T
    assert together == pytest.approx(np.array([interval(row) for row in rows]))


@pytest.mark.parametrize(
    ("low", "high", "replicates", "floor", "said"),
    [
        (0.01, 0.30, 3, np.nan, 1),
        (-0.01, 0.30, 3, np.nan, 0),
        (-0.30, -0.01, 3, np.nan, 1),
        (0.01, 0.04, 4, 0.10, 0),
        (0.01, 0.06, 4, 0.10, 1),
        (-0.06, -0.01, 4, 0.10, 1),
        (-0.04, -0.01, 4, 0.10, 0),
        (0.01, 0.04, 9, 0.10, 1),
        (0.01, 0.06, 2, 0.05, 1),
        (0.01, 0.06, 2, np.nan, np.nan),
        (np.nan, np.nan, 1, 0.05, np.nan),
    ],
)
def test_what_is_told_apart(low: float, high: float, replicates: int, floor: float, said: float) -> None:
    got = differs(np.array([low]), np.array([high]), replicates=replicates, floor=floor)
    assert got == pytest.approx([said], nan_ok=True)


# --- the rule on recorded and on drawn samples --------------------------------------------------


def recorded(kind: str) -> Floats:
    """Log ratios of step times of processes that ran the same cell; the file says where and when."""
    found = json.loads(SAMPLES.read_text())[kind]
    pairs = np.log(np.reshape(found, (-1, 2)))
    return pairs[:, 1] - pairs[:, 0]


def drawn(count: int) -> Floats:
    return np.random.default_rng(7).normal(0, QUIET * np.sqrt(2), count)


def repeats(log_ratios: Floats, replicates: int, floor: float, slowdown: float, seed: int = 5) -> float:
    """The share of repeats that are called different, drawn again and again from the pairs."""
    either = np.concatenate([log_ratios, -log_ratios])
    draws = np.random.default_rng(seed).choice(either, size=(4000, replicates)) + np.log(slowdown)
    low, high = interval(draws)
    return float(np.mean(differs(low, high, replicates=replicates, floor=floor)))


@pytest.mark.parametrize(
    "own", [recorded("quiet"), recorded("busy"), drawn(40)], ids=["quiet", "busy", "drawn"]
)
@pytest.mark.parametrize("replicates", [2, 3, 5])
def test_at_most_one_in_twenty_equal_cells_is_called_different(own: Floats, replicates: int) -> None:
    """Each repeat draws the pairs that its floor rests on apart from those that it judges.

    With two replicates it is just one in twenty: 60,000 draws tell that to 0.1 %, twice which is allowed for.
    """
    rng, either = np.random.default_rng(11), [*own, *-own]
    floors = np.array([noise_floor.floor_of(rng.choice(either, size=40)) for _ in range(3000)])
    low, high = interval(rng.choice(either, size=(3000, 20, replicates)))
    assert np.mean(differs(low, high, replicates=replicates, floor=floors[:, None])) <= 0.052


@pytest.mark.parametrize("own", [recorded("quiet"), drawn(40)], ids=["recorded", "drawn"])
def test_five_replicates_on_a_quiet_machine_find_a_slowdown_of_a_tenth(own: Floats) -> None:
    assert repeats(own, 5, noise_floor.floor_of(own), 1.10) >= 0.95


def test_on_a_busy_machine_they_do_not() -> None:
    own = recorded("busy")
    assert repeats(own, 5, noise_floor.floor_of(own), 1.10) < 0.5


@pytest.mark.parametrize("kind", ["quiet", "busy"])
@pytest.mark.parametrize("replicates", [2, 3, 5])
def test_the_least_slowdown_found_is_found_as_often_as_it_says(replicates: int, kind: str) -> None:
    own = recorded(kind)
    floor = noise_floor.floor_of(own)
    least = noise.smallest_found(own, replicates, floor)
    assert repeats(own, replicates, floor, least * 1.002) == pytest.approx(noise.FOUND, abs=0.02)
    assert repeats(own, replicates, floor, 1 + (least - 1) / 2) < 0.9


@pytest.mark.parametrize("count", [4, noise_floor.ENOUGH, 60])
def test_a_new_pair_exceeds_the_floor_once_in_twenty(count: int) -> None:
    draws = np.random.default_rng(count).normal(0, 0.02, size=(3000, count + 1))
    exceeds = [abs(row[-1]) > noise_floor.floor_of(row[:-1]) for row in draws]
    assert np.mean(exceeds) == pytest.approx(0.05, abs=0.015)


def test_without_pairs_nothing_is_known() -> None:
    assert np.isnan(noise_floor.floor_of(np.array([])))
    assert np.isnan(noise.smallest_found(np.array([]), 5, np.nan))


# --- in the report -------------------------------------------------------------------------------


def frame_of(folder: Path, times: dict[str, list[float]], **other: Any) -> pd.DataFrame:
    """Records of these step times by variant, one a replicate, as a frame."""
    found = [
        record(variant, replicate=r, step_seconds_median=value, tokens_per_second=2048 / value, **other)
        for variant, values in times.items()
        for r, value in enumerate(values)
    ]
    return collect(write(folder, found)).frame


def with_twins(frame: pd.DataFrame, factors: list[float]) -> pd.DataFrame:
    """The frame and, of its dense cells, twins whose times are these factors of theirs, by replicate."""
    again = frame[frame["variant"] == "dense"].assign(twin=1)
    again["step_seconds_median"] *= [factors[r] for r in again["replicate"]]
    return with_compared_time(pd.concat([frame, again], ignore_index=True))


def test_a_drift_over_rounds_is_no_spread_of_the_ratio(tmp_path: Path) -> None:
    """Each round is half as slow again as the one before, for dense and for the other alike."""
    rounds = [1.0, 1.5, 2.25]
    times = {
        "dense": rounds,
        "chunked": [0.8 * t * f for t, f in zip(rounds, (1.0, 1.01, 0.99), strict=True)],
    }
    cells = cost_cells(frame_of(tmp_path / "e", times)).set_index("variant")
    cell = cells.loc["chunked"]
    assert cell["step_seconds_ratio"] == pytest.approx(0.8)
    assert 0.77 < cell["step_seconds_ratio_low"] < 0.8 < cell["step_seconds_ratio_high"] < 0.83
    assert cell["step_seconds_high"] / cell["step_seconds_low"] > 2
    assert cell["differs"]
    assert cell["tokens_per_second_ratio"] == pytest.approx(1 / 0.8)


def test_ratios_are_of_the_replicates_that_both_have(tmp_path: Path) -> None:
    times = {"dense": [1.0, 2.0], "chunked": [2.0, 4.4, 100.0]}
    cell = cost_cells(frame_of(tmp_path / "e", times)).set_index("variant").loc["chunked"]
    assert cell["step_seconds_ratio"] == pytest.approx(2.1)
    assert (cell["rounds"], cell["replicates"]) == (2, 3)


def test_two_replicates_are_told_apart_by_the_floor_alone(tmp_path: Path) -> None:
    times = {
        "dense": [1.0, 1.0],
        "chunked": [1.02, 1.03],
        "longformer": [1.2, 1.3],
        "overlapping": [0.9, 1.3],
    }
    frame = frame_of(tmp_path / "e", times)
    unknown = cost_cells(frame).set_index("variant")["differs"]
    assert unknown.isna().all()
    floors = noise_floor.floors(noise_floor.pairs(with_twins(frame, [1.02, 0.98])))
    cells = cost_cells(frame, floors)
    assert cells.set_index("variant")["differs"].dropna().to_dict() == {
        "chunked": False,
        "longformer": True,
        "overlapping": False,
    }
    rows = {row["variant"]: row for row in table("## T\n" + markdown.table(cost(cells)), "## T")}
    assert rows["chunked"]["time / dense"] == "1.02×≈" or rows["chunked"]["time / dense"] == "1.03×≈"
    assert rows["longformer"]["time / dense"] == "1.25×"
    assert rows["longformer"]["95 % of ratio"] == "1.20–1.30×ʳ"
    assert rows["dense"]["95 % of ratio"] == "–"


def test_a_single_replicate_says_that_nothing_says(tmp_path: Path) -> None:
    cells = cost_cells(frame_of(tmp_path / "e", {"dense": [1.0], "chunked": [3.0]}))
    rows = {row["variant"]: row for row in table("## T\n" + markdown.table(cost(cells)), "## T")}
    assert rows["chunked"]["time / dense"] == "3.00×?"
    assert "95 % interval" not in rows["chunked"]


def test_pairs_are_of_one_cell_replicate_and_code(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", {"dense": [1.0, 2.0], "chunked": [3.0, 4.0]})
    both = with_twins(frame, [1.1, 0.8])
    found = noise_floor.pairs(both)
    assert sorted(np.exp(found["log_ratio"])) == pytest.approx([0.8, 1.1])
    assert set(found["variant"]) == {"dense"}
    assert noise_floor.pairs(frame).empty
    other_code = both.assign(code_sha256=both["code_sha256"].where(both["twin"] == 0, "ef" * 32))
    assert noise_floor.pairs(other_code).empty


def test_the_head_says_the_noise_of_each_machine(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", {"dense": [1.0] * 5, "chunked": [1.3] * 5})
    factors = [1.01, 0.99, 1.02, 0.985, 1.0]
    pairs = noise_floor.pairs(with_twins(frame, factors))
    own = cost_cells(frame, noise_floor.floors(pairs))
    (row,) = noise.summary(pairs, own).to_dict("records")
    assert row["pairs"] == 5
    assert row["floor"] == pytest.approx(np.exp(noise_floor.floor_of(np.log(factors))))
    assert (row["judged"], row["called"], row["replicates"]) == (1, 0, 5)
    said = noise_tables.facts(noise.summary(pairs, own))
    assert "from 5 A/A pairs" in said["noise floor"]
    assert said["A/A called different"] == "0 of 1 (0 %)"
    assert f"with 5 replicates from {100 * (row['found'] - 1):.2f} %" in said["slowdowns found"]
    none = noise_tables.facts(noise.summary(pairs.iloc[:0], cost_cells(frame)))
    assert none == {"noise floor": "unknown, no A/A cells"}


def test_a_cell_does_not_judge_itself(tmp_path: Path) -> None:
    """A cell whose twins are far apart each time is called different, though its pairs are in the floor."""
    frame = frame_of(tmp_path / "e", {"dense": [1.0, 1.0, 1.0]})
    calm = frame_of(tmp_path / "f", {"dense": [1.0, 1.0, 1.0]}, seq_len=1024)
    found = noise_floor.pairs(
        pd.concat([with_twins(frame, [1.5, 1.51, 1.49]), with_twins(calm, [1.01, 0.99, 1.02])])
    )
    assert sorted(noise.called_different(found)) == [0, 1]


def test_contaminated_cells_are_marked_named_and_counted_in(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", {"dense": [1.0, 1.0, 1.0], "chunked": [1.0, 1.1, 2.0]})
    why = "another process took 0.9 cores"
    hit = (frame["variant"] == "chunked") & (frame["replicate"] == 2)
    frame["contaminated"] = [why if here else None for here in hit]
    cells = cost_cells(frame)
    assert cells.set_index("variant")["contaminated"].to_dict() == {"dense": 0, "chunked": 1}
    assert cells.set_index("variant")["step_seconds_max"]["chunked"] == 2.0
    rows = {row["variant"]: row for row in table("## T\n" + markdown.table(cost(cells)), "## T")}
    assert rows["chunked"]["step time"] == "1.10 s" + CONTAMINATED
    assert rows["dense"]["step time"] == "1.00 s"
    (shown,) = Contamination().tables(frame)
    (named,) = table("## T\n" + markdown.table(shown.columns), "## T")
    assert (named["variant"], named["replicate"], named["because"]) == ("chunked", "2", why)
    assert Contamination().warnings(frame)[0].startswith("1 cell timed while something else ran")
    assert not Contamination().tables(frame.assign(contaminated=None))


def test_intervals_stand_in_the_table_and_in_the_csv(tmp_path: Path) -> None:
    times = {"dense": [1.0, 1.1, 1.05, 0.95, 1.0], "chunked": [0.5, 0.55, 0.53, 0.47, 0.5]}
    found = [
        record(v, replicate=r, step_seconds_median=t, started_at=f"2026-03-0{r + 1}T10:00:00+00:00")
        for v, own in times.items()
        for r, t in enumerate(own)
    ]
    report = build(write(tmp_path / "e", found), plots=False)
    row = pd.read_csv(report / "summary.csv").set_index("variant").loc["chunked"]
    logs = np.log(times["chunked"])
    ends = np.exp(stats.t.interval(0.95, 4, loc=logs.mean(), scale=stats.sem(logs)))
    assert (row["step_seconds_low"], row["step_seconds_high"]) == pytest.approx(tuple(ends))
    said = {r["variant"]: r for r in table((report / "summary.md").read_text(), "### clm, depth 2")}
    assert said["chunked"]["95 % interval"] == f"{1e3 * ends[0]:.0f}–{1e3 * ends[1]:.0f} ms"
    assert number(said["chunked"]["time / dense"]) == pytest.approx(row["step_seconds_ratio"], rel=6e-3)
    assert "- noise floor: unknown, no A/A cells" in (report / "summary.md").read_text()
