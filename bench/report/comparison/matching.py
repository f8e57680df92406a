"""Two runs side by side: the same cells on two machines, or under two versions of the code.

Cells are matched by their configuration; the machine, its threads, the device, the implementation and the
code may differ. A ratio is the second run's figure over the first's, of the same replicate. The rounds of two
runs were not interleaved, so a drift between the runs is part of the ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.report import ReportError
from bench.report.data.collect import Collected, collect, relabelled
from bench.report.data.compared_time import SECONDS, SOURCE, with_compared_time
from bench.report.data.different import differs
from bench.report.data.disturbed import DISTURBED, RATIO_DISTURBED, flags, marked, takes_part
from bench.report.data.groups import GROUP, TRAINING
from bench.report.data.intervals import by_cell, interval
from bench.report.data.noise_floor import UNKNOWN_FLOOR, Floor, noises

SETTING = [key for key in GROUP if key not in ("machine", "threads", "device")]
"""Keys that two cells must share to be compared, with variant, label, length and training."""
CELL = [*SETTING, "variant", "label", "seq_len", *TRAINING]
RATIOS = {
    "step_seconds_median": "step_seconds",
    SECONDS: SECONDS,
    "peak_bytes": "peak_bytes",
    "flops_executed_step": "flops_executed",
}
TIMES = ["step_seconds_median", SECONDS]
"""Figures that a disturbance changes."""
FIGURES = [*RATIOS, "bits_per_byte", "perplexity", "accuracy"]


@dataclass(frozen=True)
class Run:
    """One of the two: its folder's name, its records, and the noise floor of its machine."""

    name: str
    collected: Collected
    floor: Floor


@dataclass(frozen=True)
class Comparison:
    """Both runs; `cells` has a row per matched cell, `unmatched` one per cell of only one run, with `run`."""

    runs: tuple[Run, Run]
    cells: pd.DataFrame
    unmatched: pd.DataFrame


def load(folder: Path) -> Run:
    """Read a run. Raises ReportError for a run without records, or with records of several machines."""
    collected = collect(folder)
    if collected.frame.empty:
        raise ReportError(f"{folder}: no records to compare")
    machines = sorted(collected.frame.loc[collected.frame["status"] == "ok", "machine"].unique())
    if len(machines) > 1:
        raise ReportError(f"{folder}: holds records of several machines ({', '.join(machines)}); compare one")
    found = noises(collected.every)
    floor = found[machines[0]].floor if machines else UNKNOWN_FLOOR
    return Run(folder.resolve().name, collected, floor)


def compare(first: Run, second: Run) -> Comparison:
    """Match the cells of two runs.

    Columns of `cells`: the keys of `CELL`; `status_first`, `status_second`; for each figure of `FIGURES`
    its median over replicates `X_first` and `X_second`; of `RATIOS` the median `X_ratio`, second over
    first, over the `rounds` (the replicates that both have), and its interval `X_ratio_low` and
    `X_ratio_high`; `same_data`, whether their data are equal to the byte; where they are, `nll_change`
    with `nll_change_low` and `nll_change_high`, in nats; `time_source`; and `differs`, what
    `different.differs` says of the compared time (the device's where both runs have it), with all cells as
    one family and the larger noise floor of the two. Disturbed measurements take part in times and their
    ratios only where a cell has no others: `disturbed_first`, `disturbed_second`, `ratio_disturbed`.
    """
    both = pd.concat(
        [run.collected.frame.assign(run=place) for place, run in enumerate((first, second))],
        ignore_index=True,
    )
    # Labelled again together, so that equal cells of the two runs have equal names.
    known = both["data_json"].where(both["data_known"])  # null in an older record
    both = both.assign(impl=None, data_sha256="", hash=both["data_sha256"], data_json=known)
    both = with_compared_time(relabelled(both), among=())
    figures = [*FIGURES, "nll"]
    measured = [figure for figure in figures if figure != "flops_executed_step"]
    both[measured] = both[measured].where(both["status"] == "ok")
    both = marked(both)
    timed = both[both[SECONDS].notna()]
    timed = timed[takes_part(timed, [*CELL, "run"])]
    groups = both.groupby([*CELL, "run"], sort=False, dropna=False)
    figures_of = groups[FIGURES].median()
    timings = timed.groupby([*CELL, "run"], sort=False, dropna=False)
    figures_of[TIMES] = timings[TIMES].median()
    medians = figures_of.unstack("run")
    statuses = groups["status"].agg(lambda values: ", ".join(sorted(values.unique()))).unstack("run")
    matched = statuses.notna().all(axis=1)
    disturbed = timings[DISTURBED].any().unstack("run").reindex(index=statuses.index, columns=[0, 1])
    columns = {f"status_{end}": statuses[run] for run, end in enumerate(("first", "second"))}
    columns["same_data"] = groups["hash"].first().unstack("run").nunique(axis=1) == 1
    columns |= {
        f"{figure}_{end}": medians[figure, run]
        for figure in FIGURES
        for run, end in enumerate(("first", "second"))
    }
    columns |= {f"disturbed_{end}": disturbed[run].eq(True) for run, end in enumerate(("first", "second"))}
    cells = pd.DataFrame(columns)[matched].join(_paired(both)).reset_index()
    cells[RATIO_DISTURBED] = cells[RATIO_DISTURBED].eq(True)
    changes = [f"nll_change{end}" for end in ("", "_low", "_high")]
    cells[changes] = cells[changes].where(cells["same_data"])
    cells["rounds"] = cells["rounds"].fillna(0).astype(int)
    low, high = (np.log(cells[f"{SECONDS}_ratio_{end}"].to_numpy(dtype=float)) for end in ("low", "high"))
    cells[SOURCE] = both[SOURCE].iloc[0]
    # NaN where either is not known: of the other kind of time it says nothing
    same = all((run.collected.frame[SOURCE] == both[SOURCE].iloc[0]).all() for run in (first, second))
    floor = float(np.max([first.floor.upper, second.floor.upper])) if same else float("nan")
    differing = differs(low, high, replicates=cells["rounds"], floor=floor)
    cells["differs"] = pd.Series(differing).astype("boolean")
    unmatched = statuses[~matched]
    names = np.where(unmatched[0].notna(), 0, 1)
    unmatched = unmatched.reset_index()[CELL].assign(run=names)
    order = [*SETTING, "variant", "label", "seq_len"]
    return Comparison(
        (first, second),
        cells.sort_values(order, ignore_index=True, kind="stable"),
        unmatched.sort_values(["run", *order], ignore_index=True, kind="stable"),
    )


def _paired(both: pd.DataFrame) -> pd.DataFrame:
    """By cell: the ratios and changes within a replicate, and over how many replicates."""
    each = both.groupby([*CELL, "replicate", "run"], sort=False, dropna=False)
    figures = each[[*RATIOS, "nll"]].median().unstack("run")
    # a ratio is disturbed if either side is
    flagged = each[DISTURBED].any().unstack("run").reindex(figures.index).eq(True).any(axis=1)
    rows = figures.index.to_frame(index=False).assign(**{DISTURBED: flagged.to_numpy()})
    in_both = pd.DataFrame(figures[SECONDS]).notna().to_numpy().sum(axis=1) == 2
    used = in_both.copy()
    used[in_both] = takes_part(rows[in_both], CELL)
    columns: dict[str, Any] = {RATIO_DISTURBED: flags(rows[used], CELL)}
    for source, name in RATIOS.items():
        ratios = figures[source, 1] / figures[source, 0] if (source, 1) in figures else pd.Series(dtype=float)
        if source in TIMES:
            ratios = ratios.where(used) if len(ratios) else ratios
        ends = by_cell(ratios, CELL)
        columns[f"{name}_ratio"] = ratios.groupby(level=CELL, sort=False, dropna=False).median()
        columns |= {f"{name}_ratio_{end}": ends[end] for end in ("low", "high")}
        if source == SECONDS:
            columns["rounds"] = ends["count"]
    change = (figures["nll", 1] - figures["nll", 0]).dropna()
    grouped = change.groupby(level=CELL, sort=False, dropna=False)
    columns["nll_change"] = grouped.mean()
    for place, end in enumerate(("low", "high")):
        columns[f"nll_change_{end}"] = grouped.agg(_end, place)
    return pd.DataFrame(columns)


def _end(values: pd.Series[float], side: int) -> float:
    return float(interval(np.asarray(values, dtype=np.float64))[side])
