"""Figures of time in simulated sweeps whose truth is known: nulls, crossovers, and a planted disturbance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from test_report import record, table, write

from bench.records import Record
from bench.report.data.collect import collect
from bench.report.data.compared_time import SECONDS
from bench.report.data.crossing import bracket, crossing, onsets, ratio_error
from bench.report.data.different import NORMAL, differs
from bench.report.data.experiment import read
from bench.report.data.intervals import interval
from bench.report.data.noise_floor import ENOUGH, floors, noises
from bench.report.data.ratios import MEASURED
from bench.report.data.statistics import cost_cells
from bench.report.sections import Results, compute
from bench.report.sections.cost import Cost
from bench.report.sections.crossover import Crossover
from bench.report.sections.growth import Growth
from bench.report.text import markdown
from bench.report.text.marks import CONTAMINATED

Floats = npt.NDArray[np.float64]
VARIANTS = ("chunked", "longformer", "overlapping", "performer", "routing", "reformer")
LENGTHS = (512, 1024, 2048, 4096)
SPREAD = 0.02
"""Standard deviation of the logarithm of a process's time."""
WHY = "another process took 0.9 cores"


def sweep(rounds: int, lengths: tuple[int, ...] = LENGTHS, **other: Any) -> list[Record]:
    """Records in the order of a sweep: dense before and after every two variants, as twins."""
    found: list[Record] = []
    for replicate in range(rounds):
        for length in lengths:
            order = ["dense"]
            for pair in zip(VARIANTS[::2], VARIANTS[1::2], strict=True):
                order += [*pair, "dense"]
            for place, variant in enumerate(order):
                clock = len(found) * 10
                when = f"2026-03-01T{10 + clock // 3600}:{clock // 60 % 60:02d}:{clock % 60:02d}.000+00:00"
                twin = order[:place].count("dense") if variant == "dense" else 0
                own = {"cell_id": f"c{len(found)}", "twin": twin, "started_at": when, **other}
                found.append(record(variant, length, replicate=replicate, **own))
    return found


def timed(frame: pd.DataFrame, seconds: Floats) -> pd.DataFrame:
    """The records with other times."""
    tokens = frame["batch_size"] * frame["seq_len"]
    rates = dict.fromkeys(("tokens_per_second", "compared_tokens_per_second"), tokens / seconds)
    return frame.assign(step_seconds_median=seconds, **{SECONDS: seconds}, **rates)


# --- what ratios are relative to -----------------------------------------------------------------


def test_a_ratio_is_to_dense_before_and_after(tmp_path: Path) -> None:
    """In a machine that becomes slower and slower, equal cells have equal times."""
    every = collect(write(tmp_path / "e", sweep(2))).every
    order = every["started_at"].rank().to_numpy(dtype=float)
    every = timed(every, np.exp(0.05 * order))
    cells = cost_cells(every[every["twin"] == 0], {}, every)
    others = cells[cells["label"] != "dense"]
    # of two between two of dense, one is a third of the way and the other two thirds: 1 ∓ 0.05 / 2
    assert np.abs(np.log(others[f"{SECONDS}_ratio"])).max() == pytest.approx(0.025)
    assert (others[MEASURED] == 2).all()
    alone = cost_cells(every[every["twin"] == 0])
    far = alone[alone["variant"] == "reformer"]
    assert np.log(far[f"{SECONDS}_ratio"]).min() > 0.3
    assert (far[MEASURED] == 1).all()
    assert (alone.loc[alone["label"] == "dense", f"{SECONDS}_ratio"] == 1).all()


def test_records_that_do_not_say_when_are_compared_with_the_mean(tmp_path: Path) -> None:
    every = collect(write(tmp_path / "e", sweep(1, (512,)))).every
    every = timed(every, np.where(every["variant"] == "dense", 1.0 + every["twin"], 6.0))
    every["started_at"] = None
    cells = cost_cells(every[every["twin"] == 0], {}, every)
    others = cells[cells["label"] != "dense"]
    assert list(others[f"{SECONDS}_ratio"]) == pytest.approx([6 / 24 ** (1 / 4)] * len(VARIANTS))


# --- nulls ---------------------------------------------------------------------------------------


def false_calls(every: pd.DataFrame, runs: int, *, tails: bool, seed: int) -> tuple[float, float]:
    """The share of simulated runs in which a report calls any cell different, though all are equal; and the
    share in which one would if differences larger than the floor's estimate were called.

    Each run is a machine of its own, so that one call computes the cells of all of them.
    """
    rng = np.random.default_rng(seed)
    shape = (runs, len(every))
    noise = rng.standard_t(4, shape) / np.sqrt(2) if tails else rng.normal(size=shape)
    rounds = rng.normal(0, 0.1, size=(runs, 9))[:, every["replicate"]]
    walk = np.cumsum(rng.normal(0, SPREAD / 10, size=shape), axis=1)
    order = every["started_at"].rank().to_numpy(dtype=int) - 1
    seconds = np.exp(SPREAD * noise + rounds + walk[:, order])
    machines = [every.assign(machine=f"m{run:04d}") for run in range(runs)]
    both = timed(pd.concat(machines, ignore_index=True), seconds.ravel())
    known = floors(noises(both))
    cells = cost_cells(both[both["twin"] == 0], known, both)
    called, naive = [], []
    for machine, own in cells[cells["label"] != "dense"].groupby("machine"):
        low, high = (np.log(own[f"{SECONDS}_ratio_{end}"].to_numpy()) for end in ("low", "high"))
        found = differs(low, high, replicates=own["rounds"], floor=np.full(len(own), known[str(machine)]))
        assert not np.isnan(found).any()
        called.append((found == 1).any())
        naive.append((np.maximum(np.abs(low), np.abs(high)) > 1.96 * np.sqrt(2) * SPREAD).any())
    return float(np.mean(called)), float(np.mean(naive))


@pytest.mark.parametrize("rounds", [2])
def test_few_runs_have_any_false_difference(rounds: int, tmp_path: Path) -> None:
    """At most one run in twenty, of 12 comparisons each, in noise with long tails and with drift."""
    every = collect(write(tmp_path / "e", sweep(rounds, (512, 4096)))).every
    called, naive = false_calls(every, 40, tails=True, seed=2)
    assert called <= 0.05
    assert naive > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_few_runs_of_many_have_any_false_difference(rounds: int, tails: bool, tmp_path: Path) -> None:
    every = collect(write(tmp_path / "e", sweep(rounds))).every
    called, _ = false_calls(every, 200, tails=tails, seed=rounds)
    assert called <= 0.05


# --- crossovers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_brackets_cover_the_crossover(rounds: int) -> None:
    """Of ratios that fall with the length, measured once to five times, with the floor known."""
    rng = np.random.default_rng(rounds)
    lengths = np.array(LENGTHS, dtype=float)
    hits, widths = [], []
    for _ in range(300):
        truth = np.exp(rng.uniform(np.log(600), np.log(3800)))
        slope = rng.uniform(0.15, 0.6)
        logs = slope * np.log2(truth / lengths) + rng.normal(0, 0.06, size=(rounds, 4))
        low, high = interval(logs.T)
        cells = pd.DataFrame({"rounds": rounds, "noise_floor": np.exp(NORMAL * 0.06)}, index=range(4))
        cells[f"{SECONDS}_ratio_low"], cells[f"{SECONDS}_ratio_high"] = np.exp(low), np.exp(high)
        ends = bracket(list(lengths), list(np.exp(np.median(logs, axis=0))), *ratio_error(cells))
        hits.append(ends[0] <= truth <= ends[1])
        widths.append(np.log2(min(ends[1], 8192) / max(ends[0], 256)))
    assert np.mean(hits) >= 0.9
    assert np.median(widths) < 2.5  # of five doublings: it says something


def test_without_noise_between_cells_brackets_would_not_cover() -> None:
    """Two rounds agree by chance: their range alone, which reports took before, covers far less."""
    rng = np.random.default_rng(5)
    lengths = np.array(LENGTHS, dtype=float)
    hits = []
    for _ in range(300):
        truth = np.exp(rng.uniform(np.log(600), np.log(3800)))
        logs = 0.3 * np.log2(truth / lengths) + rng.normal(0, 0.06, size=(2, 4))
        ends = onsets(list(lengths), np.array([logs.min(axis=0), logs.max(axis=0)]))
        hits.append(ends[0] <= truth <= ends[1])
    assert np.mean(hits) < 0.75


def test_a_bracket_needs_to_know_its_noise() -> None:
    cells = pd.DataFrame({"rounds": [1, 1], "noise_floor": np.nan})
    cells[[f"{SECONDS}_ratio_low", f"{SECONDS}_ratio_high"]] = np.nan
    assert np.isnan(bracket([512, 1024], [1.2, 0.8], *ratio_error(cells))).all()
    known = bracket([512, 1024], [1.2, 0.8], *ratio_error(cells.assign(noise_floor=1.0)))
    assert known == pytest.approx([crossing([512, 1024], [1.2, 0.8])[1]] * 2)


def test_many_crossings_at_once_are_as_one_by_one() -> None:
    rows = np.random.default_rng(0).normal(0, 0.3, size=(200, 4))
    rows[:20] = np.round(rows[:20], 1)  # with ratios of exactly 1
    found = onsets(list(LENGTHS), rows)
    for row, length in zip(rows, found, strict=True):
        outcome, place = crossing(list(LENGTHS), list(np.exp(row)))
        assert length == pytest.approx({"from": place, "always": 0.0}.get(outcome, np.inf))


# --- a planted disturbance -----------------------------------------------------------------------


def results(folder: Path, found: list[Record]) -> Results:
    return compute(read(write(folder, found)), (Cost(), Crossover(), Growth()))


def noisy(found: list[Record]) -> list[Record]:
    """Step times with noise, and a true ratio that falls with the length."""
    rng = np.random.default_rng(9)
    for one in found:
        ratio = 1.0 if one.variant == "dense" else 1.5 * (512 / one.seq_len) ** 0.4
        one.step_seconds_median = one.seq_len / 1e4 * ratio * float(np.exp(rng.normal(0, 0.01)))
        one.tokens_per_second = one.batch_size * one.seq_len / one.step_seconds_median
    return found


@pytest.mark.parametrize("case", ["another twin", "another replicate", "no other"])
def test_a_disturbed_cell_of_dense_changes_no_unmarked_figure(case: str, tmp_path: Path) -> None:
    """One process takes the cores from one measurement of dense, which takes four times as long."""
    found = noisy(sweep(1 if case == "no other" else 2))
    if case != "another twin":
        found = [one for one in found if one.twin == 0]
    calm = results(tmp_path / "calm", found)
    (hit,) = (
        one for one in found if (one.variant, one.seq_len, one.twin, one.replicate) == ("dense", 2048, 0, 0)
    )
    hit.step_seconds_median, hit.tokens_per_second = 4 * hit.step_seconds_median, hit.tokens_per_second / 4
    hit.contaminated = WHY
    spoilt = results(tmp_path / "spoilt", found)

    first, second = calm.data["cost"], spoilt.data["cost"]
    assert list(first["label"]) == list(second["label"])
    bound = 0.1
    if case != "no other":
        floor = noises(spoilt.records.collected.every)
        bound = next(iter(floor.values())).floor.upper if case == "another twin" else 0.1
        assert bound < 0.1 or case != "another twin"
    for column, flag in (
        (f"{SECONDS}_median", "disturbed"),
        ("compared_tokens_per_second_median", "disturbed"),
        (f"{SECONDS}_ratio", "ratio_disturbed"),
    ):
        change = np.abs(np.log(second[column] / first[column]))
        assert (change[~second[flag]] < bound).all(), column
    marked = second[second["ratio_disturbed"]]
    assert len(marked) == (len(VARIANTS) if case == "no other" else 0)
    assert second["disturbed"].sum() == (case == "no other")

    one, other = calm.data["crossover"].crossovers, spoilt.data["crossover"].crossovers
    times = (one["figure"] == "time") & ~other["disturbed"]
    assert (np.abs(np.log(other["length"] / one["length"]))[times] < 0.3).all()
    assert times.any() == (case != "no other")
    fits = spoilt.data["growth"].merge(
        calm.data["growth"], on=["variant", "figure", "axis", "label"], suffixes=("", "_calm")
    )
    assert (np.abs(fits["exponent"] - fits["exponent_calm"])[~fits["disturbed"]] < 0.1).all()
    assert fits["disturbed"].sum() == (case == "no other")

    shown = table("## T\n" + markdown.block(Cost().tables(second)[0]), "## T")
    ratios = {(row["variant"], row["length"]): row["time / dense"] for row in shown}
    signs = {where for where, text in ratios.items() if CONTAMINATED in text}
    assert signs == ({(v, "2048") for v in VARIANTS} if case == "no other" else set())


def test_a_disturbed_pair_is_not_in_the_floor(tmp_path: Path) -> None:
    found = noisy(sweep(5, LENGTHS))
    for one in found:  # in each round and length, one of dense's four
        if one.variant == "dense" and one.twin == one.replicate % 4 and one.seq_len > 512:
            one.step_seconds_median, one.contaminated = 4 * one.step_seconds_median, WHY
    (noise,) = noises(collect(write(tmp_path / "e", found)).every).values()
    assert len(noise.pairs) < ENOUGH
    assert noise.floor.upper < 0.05
    for one in found:
        one.contaminated = None
    (unmarked,) = noises(collect(write(tmp_path / "f", found)).every).values()
    assert unmarked.floor.upper > 0.5
