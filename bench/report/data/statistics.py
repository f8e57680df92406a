"""Records aggregated over replicates: medians with their intervals, and ratios to dense.

Times, memory and quality come from finished cells (status ok) alone; FLOPs, parameters, gates
and predictions are properties of a configuration and come from every record that has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from bench.records import STATUSES
from bench.report.data.baselines import BASELINES, undertrained, with_baselines, without_baseline
from bench.report.data.collect import MOST_PERPLEXITY
from bench.report.data.compared_time import SECONDS, SOURCE
from bench.report.data.different import differs
from bench.report.data.disturbed import DISTURBED, flags, one_a_round
from bench.report.data.groups import BUDGET, CELL, GROUP, NUMBER, TRAINING, keyed, numbered
from bench.report.data.intervals import by_cell
from bench.report.data.ranking import Ranking, ranked
from bench.report.data.sampling import HALF_WIDTH
from bench.report.data.timings import TIMES, paired, timings

LEAK_LIMIT = 1e-3
"""An output before the cut that changes by more than this depends on the future: far above rounding."""
DRIFT_LIMIT = 0.10
"""Parameters further than this share from dense's are flagged: the comparison is not like for like."""
BASELINE = "dense"

UNKNOWN_FLOORS: Mapping[str, float] = MappingProxyType({})

_FIGURES = {**TIMES, "peak_bytes": "peak_bytes"}
_MEASURED = (
    "rss_peak_bytes",
    "param_bytes",
    "optimizer_bytes",
    "peak_grad_bytes",
    "peak_activation_bytes",
    "peak_workspace_bytes",
    "activation_bytes",
    "nvml_process_bytes",
    "seconds_total",
)
_COMPUTED = (
    "params",
    "params_active",
    "flops_algorithmic_step",
    "flops_executed_step",
    "flops_attention_step",
    "launches_step",
    "bytes_moved_step",
    "peak_bytes_predicted",
    "state_bytes",
    "cost_ratio",
    "claimed_time_exponent",
    "claimed_memory_exponent",
    "claimed_depth_exponent",
    "survey_exponent",
)
_QUALITY = (
    "nll",
    "bits_per_byte",
    "bits_per_byte_reset",
    "perplexity",
    "perplexity_reset",
    "word_perplexity",
    "accuracy",
)
CONDITIONAL = ("dropped_tokens_share", "busiest_expert_share", "visits_per_token")
"""Figures of trained models that compute a token with a part of their layers."""
_QUALITY_CELL = [*CELL, *TRAINING, "state_policy"]
_CONTEXT = {
    "effective_context": "median",
    "effective_context_low": "min",
    "effective_context_high": "max",
    "best_history": "median",
    "context_harm": "median",
    "context_harm_low": "min",
}


def status_counts(statuses: pd.Series[str]) -> str:
    """'ok' where all agree, else how many of each: 'ok 2, timeout 1'."""
    counts = statuses.value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    return ", ".join(f"{status} {counts[status]}" for status in STATUSES if status in counts)


def distinct(values: pd.Series[str]) -> str | None:
    """The different texts of a column, in order of appearance; None if all are null."""
    return "; ".join(str(v) for v in values.dropna().unique()) or None


def unasked_math(frame: pd.DataFrame) -> pd.Series[bool]:
    """Where torch chose the attention backend *math*, which stores all scores, without being asked to."""
    kernels = frame["attention_kernels"].fillna("").str.split(", ")
    took: pd.Series[bool] = kernels.map(lambda names: "math" in names).astype(bool)
    return took & (frame["impl"] != "math")


def cost_cells(
    frame: pd.DataFrame,
    floors: Mapping[str, float] = UNKNOWN_FLOORS,
    every: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per cell (all keys except the replicate): its cost and whether it finished.

    `every` has the twins of the cells too: they stand in for disturbed measurements, and those of the
    baseline are what ratios are relative to.

    Columns: the keys of `groups.CELL`; `data`, `records`, `finished`, `contaminated` (how many of those
    finished), `replicates` (with a finished record), `status`, `reason`; `X_median` (of the replicates'
    medians), `X_low` and `X_high` (their interval, see `intervals`), `X_min` and `X_max` for times, rates
    and peak memory; medians of the other figures under their own names; the gates' worst figures and
    `leaks`. Times and rates are of undisturbed measurements; where a cell has only disturbed ones they are of
    these, and `disturbed` is true. `half_width` (of `sampling`) is the median over these measurements, and
    `sampled_short` the number of those whose sampling ended on its budget.

    `*_ratio`: to the same figure of `baseline` in the same group and length. Of times and rates that is the
    median over the `rounds`, the replicates with a ratio (see `ratios`), with an interval `*_ratio_low` and
    `*_ratio_high`; `ratio_disturbed` says whether it rests on a disturbed measurement of either, and
    `baseline_measurements` to how many of the baseline each ratio is relative at least. Of the other figures,
    which hardly vary, it is the ratio of the medians. `differs` says whether the compared time's ratio
    tells the cell apart from `baseline`, as `different.differs` does, with all cells as one family and the
    noise floor in `floors` by machine.
    """
    frame = _finished_only(frame, [*_FIGURES, *_MEASURED])
    frame = frame.assign(**{NUMBER: numbered(frame, CELL)})
    number, ok = frame[NUMBER], frame["ok"]
    grouped = frame.groupby(NUMBER, sort=False)
    columns: dict[str, pd.Series[Any]] = {
        "data": grouped["data"].first(),
        "records": grouped.size(),
        "finished": grouped["ok"].sum(),
        "contaminated": frame["contaminated"].where(ok).groupby(number).count(),
        "replicates": frame["replicate"].where(ok).groupby(number).nunique(),
        "status": grouped["status"].agg(status_counts),
        "reason": grouped["reason"].agg(distinct),
    }
    timed = timings(frame, every)
    own = one_a_round(timed, [NUMBER])
    for figures, rows in ((TIMES, own), ({"peak_bytes": "peak_bytes"}, frame)):
        rounds = rows.groupby([NUMBER, "replicate"], sort=False)[list(figures)].median()
        ranges = rows.groupby(NUMBER, sort=False)
        for source, name in figures.items():
            columns[f"{name}_median"] = rounds[source].groupby(level=NUMBER, sort=False).median()
            ends = by_cell(rounds[source], [NUMBER])
            columns |= {f"{name}_{end}": ends[end] for end in ("low", "high")}
            columns |= {f"{name}_{end}": ranges[source].agg(end) for end in ("min", "max")}
    by_time = own.groupby(NUMBER, sort=False)
    columns["mfu"] = by_time["mfu"].median()
    columns["half_width"] = by_time[HALF_WIDTH].median()
    columns["sampled_short"] = by_time["sampled_short"].sum()
    columns |= {name: grouped[name].agg(distinct) for name in ("peak_bytes_source", "peak_phase")}
    columns[SOURCE] = grouped[SOURCE].first()
    columns["attention_kernels"] = grouped["attention_kernels"].agg(distinct)
    columns["unasked_math"] = (ok & unasked_math(frame)).groupby(number).any()
    columns["launch_bound"] = (ok & frame["launch_bound"].eq(True)).groupby(number).any()
    columns |= {name: grouped[name].median() for name in (*_MEASURED, *_COMPUTED)}
    for gate in ("leak_max_abs", "reference_max_abs", "recompute_max_abs"):
        columns[gate] = grouped[gate].max()
    columns |= {name: grouped[name].agg(distinct) for name in ("flops_source", "claim_source")}
    columns[DISTURBED] = flags(own, [NUMBER]).reindex(columns["data"].index).eq(True)
    cells = keyed(frame, CELL, columns)
    cells["sampled_short"] = cells["sampled_short"].fillna(0).astype(int)
    cells["leaks"] = cells["leak_max_abs"] > LEAK_LIMIT
    cells = paired(_compared(_ordered(cells)), timed).reset_index(drop=True)
    floor = cells["machine"].map(dict(floors)).astype(float)
    cells["noise_floor"] = np.exp(floor)
    low, high = (np.log(cells[f"{SECONDS}_ratio_{end}"].to_numpy(dtype=float)) for end in ("low", "high"))
    differing = differs(low, high, replicates=cells["rounds"], floor=floor)
    cells["differs"] = pd.Series(differing).astype("boolean")
    return cells


def quality_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The `cells` of `quality`."""
    return quality(frame).cells


def quality(frame: pd.DataFrame) -> Ranking:
    """One row a cell, training (budget, rate, split, stride) and state policy with any figure of quality.

    Columns: the keys, `quality_replicates`, median `tokens_trained`, mean and standard deviation
    (n − 1; NaN for one replicate) of nll, bits per byte and perplexity (both also with state fresh in every
    window), word perplexity and accuracy, the means of `baselines.BASELINES`, `unigram_perplexity`,
    `guess_accuracy`, `eval_min_context`, those of `CONDITIONAL`, the effective context and the widest of its
    intervals, `leaks`, `undertrained`, `no_baseline`, and those of `ranking.ranked`: the interval of its rank
    among the cells of the same group, length, budget, split and stride.
    """
    reset = frame["nll_reset"]
    frame = with_baselines(frame).assign(
        perplexity_reset=np.exp(reset.where(reset <= np.log(MOST_PERPLEXITY))),
        bits_per_byte_reset=reset * frame["bits_per_byte"] / frame["nll"],
    )
    ok = frame[(frame["status"] == "ok") & frame[list(_QUALITY)].notna().any(axis=1)]
    ok = ok.assign(**{NUMBER: numbered(ok, _QUALITY_CELL)})
    grouped = ok.groupby(NUMBER, sort=False)
    columns: dict[str, pd.Series[Any]] = {"quality_replicates": grouped["replicate"].nunique()}
    for name in _QUALITY:
        columns[f"{name}_mean"] = grouped[name].mean()
        columns[f"{name}_std"] = grouped[name].std()
    medians = ("tokens_trained", "unigram_perplexity", "guess_accuracy", "tokens_evaluated")
    for name in (*medians, "eval_min_context", "train_seconds", *CONDITIONAL):
        columns[name] = grouped[name].median()
    for name, statistic in _CONTEXT.items():
        columns[name] = grouped[name].agg(statistic)
    for name in (*BASELINES, "ngram_train_bytes"):
        columns[name] = grouped[name].mean()
    columns["leaks"] = grouped["leak_max_abs"].max() > LEAK_LIMIT
    cells = keyed(ok, _QUALITY_CELL, columns).reset_index(drop=True)
    cells["undertrained"] = undertrained(cells)
    cells["no_baseline"] = without_baseline(cells)
    found = ranked(cells, ok)
    cells = found.cells.assign(score=cells["bits_per_byte_mean"].fillna(cells["perplexity_mean"]))
    # Cells that leak come last: their quality is not comparable.
    cells = cells.sort_values(["leaks", *BUDGET, "score", "label"], ignore_index=True)
    return replace(found, cells=cells.drop(columns="score"))


def summary(cost: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Cost and quality side by side; a cell with several training budgets has a row for each."""
    return cost.merge(quality.drop(columns=["leaks", "number", "beats"]), on=list(CELL), how="left")


def _finished_only(frame: pd.DataFrame, figures: list[str]) -> pd.DataFrame:
    """A copy with a column `ok`, and those figures only where the cell finished."""
    frame = frame.assign(ok=frame["status"] == "ok")
    frame[figures] = frame[figures].where(frame["ok"])
    return frame.copy()  # in one piece again: each of the figures has become a block of its own


def _ordered(cells: pd.DataFrame) -> pd.DataFrame:
    """By setting and depth; within them dense first, then by name and length."""
    cells = cells.assign(later=cells["variant"] != BASELINE)
    return cells.sort_values([*GROUP, "later", "label", "seq_len"]).drop(columns="later")


def _compared(cells: pd.DataFrame) -> pd.DataFrame:
    """Add `baseline` and the ratios of medians to it.

    The baseline of a group is its dense cell; where dense ran in several forms, the first by
    label whose implementation is sdpa, else the first by label.
    """
    cells = cells.assign(group=numbered(cells, GROUP))
    dense = cells[cells["variant"] == BASELINE]
    # False sorts before True; a label names impl only where implementations differ.
    dense = dense.assign(other=~dense["label"].str.contains("impl=sdpa", regex=False))
    dense = dense.sort_values(["other", "label"], kind="stable")
    cells["baseline"] = cells["group"].map(dense.groupby("group", sort=False)["label"].first())
    dense = dense[dense["label"] == cells["baseline"].reindex(dense.index)]
    names = {
        "peak_bytes_median": "peak_bytes_ratio",
        "flops_executed_step": "flops_executed_ratio",
    }
    place = ["group", "seq_len"]
    against = cells[place].join(dense.set_index(place)[[*names, "params"]], on=place)
    for column, name in names.items():
        cells[name] = cells[column] / against[column]
    # Dense's parameters do not depend on the length, so a length where dense has no record
    # can still be compared.
    usual = cells["group"].map(dense.groupby("group")["params"].median())
    cells["params_ratio"] = cells["params"] / against["params"].fillna(usual)
    return cells.drop(columns="group")


def at_best_rate(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The records of each model, identified by the keys, at the learning rate with its lowest mean loss."""
    by_rate = frame.groupby([*keys, "learning_rate"], dropna=False)["nll"].transform("mean")
    lowest = by_rate.groupby([frame[key] for key in keys], dropna=False).transform("min")
    best: pd.Series[bool] = by_rate == lowest
    return frame[best]
