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
from report_parts import part_of
from scipy import stats
from test_report import number, record, table, write

from bench.report.data import noise_floor
from bench.report.data.collect import collect
from bench.report.data.compared_time import with_compared_time
from bench.report.data.different import differs, outside
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
        (0.01, 0.06, 4, 0.10, 0),  # one end is within the floor of four, which is half of a pair's
        (0.06, 0.09, 4, 0.10, 1),
        (-0.09, -0.06, 4, 0.10, 1),
        (-0.06, -0.01, 4, 0.10, 0),
        (0.04, 0.06, 9, 0.10, 1),
        (0.04, 0.06, 2, 0.05, 0),
        (0.06, 0.09, 2, 0.05, 1),
        (0.06, 0.09, 2, np.nan, np.nan),
        (np.nan, np.nan, 1, 0.05, np.nan),
    ],
)
def test_what_is_told_apart(low: float, high: float, replicates: int, floor: float, said: float) -> None:
    for rule in (outside, differs):
        got = rule(np.array([low]), np.array([high]), replicates=replicates, floor=floor)
        assert got == pytest.approx([said], nan_ok=True)


def test_a_difference_that_stands_alone_may_not_stand_in_a_family() -> None:
    """Just outside the floor: enough for one comparison, too little as one of hundreds of noise."""
    low, high = np.full(200, -0.01), np.full(200, 0.01)
    low[0], high[0] = 0.105, 0.115
    alone = differs(low[:1], high[:1], replicates=2, floor=0.10)
    together = differs(low, high, replicates=np.full(200, 2), floor=0.10)
    assert (alone[0], together[0]) == (1, 0)
    low[0], high[0] = 0.3, 0.31
    assert differs(low, high, replicates=np.full(200, 2), floor=0.10).tolist() == [1, *[0] * 199]
    # what is undecided is no comparison
    low[1:] = np.nan
    low[0], high[0] = 0.105, 0.115
    assert differs(low, high, replicates=np.full(200, 2), floor=0.10)[0] == 1


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
    return float(np.mean(outside(low, high, replicates=replicates, floor=floor)))


def floor_of(log_ratios: Floats) -> noise_floor.Floor:
    """The floor of pairs that are all the measurements there are."""
    count = len(log_ratios)
    cells = np.repeat(np.arange(count), 2)
    logs = np.column_stack([np.zeros(count), log_ratios]).ravel()
    fit = noise_floor.residuals(cells, np.zeros(2 * count, dtype=int), logs)
    return noise_floor.from_model(count, [fit])


@pytest.mark.parametrize(
    "own", [recorded("quiet"), recorded("busy"), drawn(40)], ids=["quiet", "busy", "drawn"]
)
@pytest.mark.parametrize("replicates", [2, 3, 5])
def test_at_most_one_in_twenty_equal_cells_is_called_different(own: Floats, replicates: int) -> None:
    """Each repeat draws the pairs that its floor rests on apart from those that it judges."""
    rng, either = np.random.default_rng(11), [*own, *-own]
    floors = np.array([floor_of(rng.choice(either, size=40)).upper for _ in range(1000)])
    low, high = interval(rng.choice(either, size=(1000, 20, replicates)))
    assert np.mean(outside(low, high, replicates=replicates, floor=floors[:, None])) <= 0.05


@pytest.mark.parametrize("own", [recorded("quiet"), drawn(40)], ids=["recorded", "drawn"])
def test_five_replicates_on_a_quiet_machine_find_a_slowdown_of_a_tenth(own: Floats) -> None:
    assert repeats(own, 5, floor_of(own).upper, 1.10) >= 0.95


def test_on_a_busy_machine_they_do_not() -> None:
    own = recorded("busy")
    assert repeats(own, 5, floor_of(own).upper, 1.10) < 0.5


@pytest.mark.parametrize("kind", ["quiet", "busy"])
@pytest.mark.parametrize("replicates", [2, 3, 5])
def test_the_least_slowdown_found_is_found_as_often_as_it_says(replicates: int, kind: str) -> None:
    own = recorded(kind)
    floor = floor_of(own).upper
    least = noise.smallest_found(own, replicates, floor)
    assert repeats(own, replicates, floor, least * 1.002) == pytest.approx(noise.FOUND, abs=0.025)
    assert repeats(own, replicates, floor, 1 + (least - 1) / 2) < 0.9


@pytest.mark.parametrize("tails", ["normal", "long"])
@pytest.mark.parametrize("count", [6, 24, noise_floor.ENOUGH])
def test_the_bound_of_the_floor_covers_what_new_pairs_exceed_once_in_twenty(count: int, tails: str) -> None:
    """Of a floor from few pairs too, and of noise with the tails of Student's t of 4 degrees of freedom."""
    rng = np.random.default_rng(count)
    noise = rng.normal(size=(1500, count, 2)) if tails == "normal" else rng.standard_t(4, (1500, count, 2))
    twins = noise[..., 1] - noise[..., 0]
    many = rng.normal(size=(2, 10**5)) if tails == "normal" else rng.standard_t(4, (2, 10**5))
    truth = np.quantile(np.abs(many[1] - many[0]), 0.95)
    find = noise_floor.from_pairs if count >= noise_floor.ENOUGH else floor_of
    found = [find(own) for own in twins]
    assert np.mean([floor.upper >= truth for floor in found]) >= 0.93
    assert np.median([floor.estimate for floor in found]) == pytest.approx(truth, rel=0.25)
    assert all(floor.estimate <= floor.upper for floor in found)
    assert {floor.method for floor in found} == {"percentile" if count >= noise_floor.ENOUGH else "model"}


def test_the_model_is_least_squares_of_rounds_and_cells() -> None:
    """Against a fit of all effects at once, with missing measurements and with twins."""
    rng = np.random.default_rng(2)
    cells, rounds = (which.ravel() for which in np.meshgrid(np.arange(9), np.arange(3), indexing="ij"))
    kept = rng.random(27) < 0.8
    cells, rounds = np.r_[cells[kept], cells[:6]], np.r_[rounds[kept], rounds[:6]]
    logs = rng.normal(size=cells.size)
    design = np.column_stack([cells[:, None] == np.arange(9), rounds[:, None] == np.arange(3)]).astype(float)
    effects, _, rank, _ = np.linalg.lstsq(design, logs, rcond=None)
    rest = logs - design @ effects
    found = noise_floor.residuals(cells, rounds, logs)
    assert found == pytest.approx((cells.size, cells.size - rank, np.sum(rest**2), np.sum(rest**4)))


def test_without_pairs_nothing_is_known() -> None:
    assert np.isnan(noise_floor.from_model(0, [noise_floor.Residuals(0, 0, 0, 0)]).upper)
    assert np.isnan(noise.smallest_found(np.array([]), 5, np.nan))
    with pytest.raises(ValueError, match="59 pairs"):
        noise_floor.from_pairs(np.zeros(59))


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
    cells = cost_cells(frame, dict.fromkeys(frame["machine"], 0.08))
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
    found = noise_floor.pairs(noise_floor.measurements(both))
    assert sorted(np.exp(found["log_ratio"])) == pytest.approx([0.8, 1.1])
    assert set(found["variant"]) == {"dense"}
    assert noise_floor.pairs(noise_floor.measurements(frame)).empty
    other_code = both.assign(code_sha256=both["code_sha256"].where(both["twin"] == 0, "ef" * 32))
    assert noise_floor.pairs(noise_floor.measurements(other_code)).empty
    spoilt = both.assign(contaminated=[None] * 5 + ["load"])
    assert noise_floor.pairs(noise_floor.measurements(spoilt))["contaminated"].tolist() == [False, True]
    (found,) = noise_floor.noises(spoilt).values()
    assert found.pairs["log_ratio"].tolist() == pytest.approx([np.log(1.1)])


def test_the_head_says_the_noise_of_each_machine(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", {"dense": [1.0] * 5, "chunked": [1.3] * 5})
    factors = [1.01, 0.99, 1.02, 0.985, 1.0]
    every = with_twins(frame, factors)
    own = cost_cells(frame, noise_floor.floors(noise_floor.noises(every)), every)
    (row,) = noise.summary(noise_floor.noises(every), every, own).to_dict("records")
    assert (row["pairs"], row["method"], row["left_out"]) == (5, "model", 0)
    # the model: two cells, five rounds, fifteen measurements; chunked and the twins differ from dense
    assert 1 < row["floor"] < row["upper"] < 1.1
    # without its only A/A cell there is no floor, so its interval alone judges it
    assert (row["judged"], row["called"], row["replicates"], row["comparisons"]) == (1, 0, 5, 1)
    said = noise_tables.facts(noise.summary(noise_floor.noises(every), every, own))
    assert "5 A/A pairs" in said["noise floor"]
    assert f"at most {100 * (row['upper'] - 1):.2f} %" in said["noise floor"]
    assert f"with 5 replicates from {100 * (row['found'] - 1):.2f} %" in said["slowdowns found"]
    assert said["sampling"].startswith("0 of 15 measurements ended on their budget")
    none = noise_tables.facts(noise.summary(noise_floor.noises(frame), frame, cost_cells(frame)))
    assert none["noise floor"] == "unknown, no A/A cells"
    assert "slowdowns found" not in none


def test_measurements_short_of_their_precision_are_counted(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", {"dense": [1.0, 1.0], "chunked": [1.3, 1.3]})
    widths = {"dense": [0.05, 0.02], "chunked": [0.04, 0.09]}
    frame["step_precision"] = [
        widths[v][r] for v, r in zip(frame["variant"], frame["replicate"], strict=True)
    ]
    frame["sampling_end"] = ["precise" if width == 0.02 else "budget" for width in frame["step_precision"]]
    found = noise.sampling(frame)
    assert (found["measurements"], found["sampled_short"]) == (4, 3)
    assert found["half_width"] == pytest.approx(0.045)
    assert found["half_width_largest"] == 0.09
    rows = {r["variant"]: r for r in table("## T\n" + markdown.table(cost(cost_cells(frame))), "## T")}
    assert rows["dense"]["sampled within"] == "± 3.50 %ˢ"
    assert rows["chunked"]["sampled within"] == "± 6.50 %ˢ"
    frame["sampling_end"] = "precise"
    rows = {r["variant"]: r for r in table("## T\n" + markdown.table(cost(cost_cells(frame))), "## T")}
    assert rows["dense"]["sampled within"] == "± 3.50 %"


def test_a_cell_does_not_judge_itself(tmp_path: Path) -> None:
    """A cell whose twins are far apart each time is called different, though its pairs are in the floor."""
    frame = frame_of(tmp_path / "e", {"dense": [1.0, 1.0, 1.0]})
    calm = [frame_of(tmp_path / f"{n}", {"dense": [1.0, 1.0, 1.0]}, seq_len=n) for n in (1024, 2048)]
    factors = ([1.01, 0.99, 1.02], [1.01, 1.0, 0.98])
    twins = [with_twins(own, of) for own, of in zip(calm, factors, strict=True)]
    every = pd.concat([with_twins(frame, [1.5, 1.51, 1.49]), *twins], ignore_index=True)
    (found,) = noise_floor.noises(every).values()
    assert sorted(noise.called_different(found)) == [0, 0, 1]


def test_many_pairs_speak_for_themselves(tmp_path: Path) -> None:
    """At least 60 pairs give the percentile; twins are paired in the order in which they ran."""
    frame = frame_of(tmp_path / "e", {"dense": [1.0] * 30})
    rng = np.random.default_rng(3)
    twins = [
        frame.assign(
            twin=k,
            step_seconds_median=np.exp(rng.normal(0, 0.02, 30)),
            started_at=f"2026-03-01T10:0{9 - k}:00+00:00",
        )
        for k in range(5)
    ]
    every = with_compared_time(pd.concat(twins, ignore_index=True))
    pairs = noise_floor.pairs(noise_floor.measurements(every))
    assert len(pairs) == 60  # the fifth, which ran first, is paired with the fourth; one stays alone
    times = {k: np.log(twin["step_seconds_median"].to_numpy()) for k, twin in enumerate(twins)}
    expected = np.concatenate([times[3] - times[4], times[1] - times[2]])
    assert sorted(pairs["log_ratio"]) == pytest.approx(sorted(expected))
    (found,) = noise_floor.noises(every).values()
    again = noise_floor.from_pairs(expected)
    assert (found.floor.estimate, found.floor.upper) == pytest.approx((again.estimate, again.upper))


def test_disturbed_measurements_count_only_where_there_are_no_others(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", {"dense": [1.0, 1.0, 1.0], "chunked": [1.0, 1.1, 2.0]})
    why = "another process took 0.9 cores"
    hit = (frame["variant"] == "chunked") & (frame["replicate"] == 2)
    frame["contaminated"] = [why if here else None for here in hit]
    cells = cost_cells(frame)
    assert cells.set_index("variant")["contaminated"].to_dict() == {"dense": 0, "chunked": 1}
    assert cells.set_index("variant")["step_seconds_max"]["chunked"] == 1.1
    assert cells.set_index("variant")["rounds"]["chunked"] == 2
    rows = {row["variant"]: row for row in table("## T\n" + markdown.table(cost(cells)), "## T")}
    assert rows["chunked"]["step time"] == "1.05 s"
    assert rows["chunked"]["time / dense"] == "1.05×?"
    assert rows["dense"]["step time"] == "1.00 s"
    (shown,) = Contamination().tables(frame)
    (named,) = table("## T\n" + markdown.table(shown.columns), "## T")
    assert (named["variant"], named["replicate"], named["because"]) == ("chunked", "2", why)
    assert Contamination().warnings(frame)[0].startswith("1 cell timed while something else ran")
    assert not Contamination().tables(frame.assign(contaminated=None))
    # no other measurement of either: shown, with the mark, and the ratios inherit that of dense
    frame["contaminated"] = [why if variant == "dense" else None for variant in frame["variant"]]
    cells = cost_cells(frame)
    rows = {row["variant"]: row for row in table("## T\n" + markdown.table(cost(cells)), "## T")}
    assert rows["dense"]["step time"] == "1.00 s" + CONTAMINATED
    assert rows["chunked"]["step time"] == "1.10 s"
    assert rows["chunked"]["time / dense"] == "1.10×≈" + CONTAMINATED


def test_intervals_stand_in_the_table_and_in_the_csv(tmp_path: Path) -> None:
    times = {"dense": [1.0, 1.1, 1.05, 0.95, 1.0], "chunked": [0.5, 0.55, 0.53, 0.47, 0.5]}
    found = [
        record(v, replicate=r, step_seconds_median=t, started_at=f"2026-03-0{r + 1}T10:00:00+00:00")
        for v, own in times.items()
        for r, t in enumerate(own)
    ]
    part = part_of(tmp_path / "e", found, "cells", "noise")
    row = part.files()["summary"].set_index("variant").loc["chunked"]
    logs = np.log(times["chunked"])
    ends = np.exp(stats.t.interval(0.95, 4, loc=logs.mean(), scale=stats.sem(logs)))
    assert (row["step_seconds_low"], row["step_seconds_high"]) == pytest.approx(tuple(ends))
    said = {r["variant"]: r for r in table(part.text, "### clm, depth 2")}
    assert said["chunked"]["95 % interval"] == f"{1e3 * ends[0]:.0f}–{1e3 * ends[1]:.0f} ms"
    assert number(said["chunked"]["time / dense"]) == pytest.approx(row["step_seconds_ratio"], rel=6e-3)
    assert "- noise floor: unknown, no A/A cells" in part.text
