"""The tables of summary.md, each from the aggregated cells, and the files summary.csv and cells.parquet."""

from __future__ import annotations

import io
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench import records
from bench.records import Record, Status
from bench.report import markdown, units
from bench.report.collect import UNKNOWN, spoken
from bench.report.columns import Column, each
from bench.report.groups import GROUP, SETTING, TRAINING, describe, split, training, varying
from bench.report.interval_cells import against, interval, marked_range, timed
from bench.report.statistics import DRIFT_LIMIT, distinct

LEAK, DRIFT, PREDICTED = "†", "‡", "ᵖ"
_WHOLE = (
    "params",
    "flops_",
    "peak_bytes",
    "rss_",
    "activation_bytes",
    "param_bytes",
    "optimizer_bytes",
    "peak_grad",
    "peak_activation",
    "peak_workspace",
    "longest_",
    "largest_",
    "budget_",
    "nvml_",
    "state_bytes",
    "tokens_",
    "eval_",
    "effective_",
    "rank",
    "reach",
)


def csv(table: pd.DataFrame) -> str:
    """The table as CSV, in base units; counts that are whole are printed without a fraction."""
    table = table.copy()
    for name in table.columns[table.columns.str.startswith(_WHOLE)]:
        values = table[name]
        if values.dtype.kind == "f" and bool(
            (values.dropna() % 1 == 0).all() and (values.dropna() < 2**53).all()
        ):
            table[name] = values.astype("Int64")
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue()


def parquet(found: list[Record], stale: Mapping[str, str]) -> bytes:
    """Every readable record, one row each, one column a key, parameters as JSON text; and `stale`, which says
    of a record that the tables leave out why.

    Types do not depend on which cells are null: counts are Int64, figures and FLOPs (which can
    pass 64 bits) double, texts string.
    """
    columns: dict[str, Any] = records.columns_of(found)
    for name in ("variant_params", "data_params"):
        columns[name] = [
            None if value is None else json.dumps(value, sort_keys=True, default=str)
            for value in columns[name]
        ]
    kinds = {int: "Int64", float: "float64", bool: "boolean", str: "string", Status: "string"}
    for name, hint in typing.get_type_hints(Record).items():
        optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
        kind = kinds.get(typing.get_args(hint)[0] if optional else hint)
        if name.startswith("flops_") and kind == "Int64":
            kind = "float64"
        if kind:  # from the values themselves: a column with nulls would have been one of floats
            columns[name] = pd.Series(columns[name], dtype=kind)
    columns["stale"] = pd.Series([stale.get(record.cell_id) for record in found], dtype="string")
    frame = pd.DataFrame(columns)
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def label_of(row: pd.Series[Any]) -> str:
    """A variant's label, marked where it sees the future."""
    return str(row["label"]) + (LEAK if row["leaks"] else "")


def cost(cells: pd.DataFrame) -> list[Column]:
    """What each variant costs at each length, within one group."""
    rows = [row for _, row in cells.iterrows()]
    ratio_ends = [units.ratios(r["step_seconds_ratio_low"], r["step_seconds_ratio_high"]) for r in rows]
    return [
        Column("variant", [label_of(row) for row in rows], right=False, optional=False),
        each(cells, "length", "seq_len", str, optional=False),
        Column("step time", [timed(row, "step_seconds_median", units.seconds) for row in rows]),
        Column("95 % interval", interval(rows, "step_seconds", "seconds")),
        Column("time / dense", [units.ratio(r["step_seconds_ratio"]) + against(r) for r in rows]),
        Column("95 % of ratio", marked_range(ratio_ends, cells["rounds"])),
        each(cells, "throughput", "tokens_per_second_median", units.rate),
        each(cells, "utilisation", "mfu", units.percent),
        Column("peak memory", [peak(row) for row in rows]),
        each(cells, "memory / dense", "peak_bytes_ratio", units.ratio),
        each(cells, "algorithmic FLOPs", "flops_algorithmic_step", units.flops),
        each(cells, "executed FLOPs", "flops_executed_step", units.flops),
        each(cells, "attention FLOPs", "flops_attention_step", units.flops),
        each(cells, "replicates", "replicates", str, optional=False),
        each(cells, "status", "status", str, right=False, optional=False),
    ]


def peak(row: pd.Series[Any]) -> str:
    """Measured peak memory, else the prediction with its mark."""
    measured = not pd.isna(row["peak_bytes_median"])
    value = row["peak_bytes_median"] if measured else row["peak_bytes_predicted"]
    predicted = not measured or "predicted" in str(row["peak_bytes_source"])
    return units.size(value) + (PREDICTED if predicted and not pd.isna(value) else "")


def plus_minus(mean: Any, std: Any) -> str:
    """Mean ± deviation; the mean alone where one replicate gives no deviation."""
    if pd.isna(mean) or pd.isna(std):
        return units.score(mean)
    places = len(units.score(mean).partition(".")[2])
    return f"{units.score(mean)} ± {std:,.{places}f}"


def _context(row: pd.Series[Any]) -> str:
    """The effective context and its interval, in tokens."""
    if pd.isna(row["effective_context"]):
        return units.MISSING
    low, high = units.whole(row["effective_context_low"]), units.whole(row["effective_context_high"])
    return f"{units.whole(row['effective_context'])} ({low}–{high})"


def quality(cells: pd.DataFrame) -> list[Column]:
    """How well each variant models; leak-free cells first, best first within what compares."""
    rows = [row for _, row in cells.iterrows()]
    ranks = [LEAK if row["leaks"] else units.whole(row["rank"]) for row in rows]
    columns = [
        Column("rank", ranks, optional=False),
        Column("variant", [label_of(row) for row in rows], right=False, optional=False),
    ]
    columns += [
        each(cells, key, key, str, right=False)
        for key in varying(cells, SETTING)
        if key not in ("objective", "corpus", "d_model", "heads")
    ]
    return [
        *columns,
        each(cells, "length", "seq_len", str, optional=False),
        each(cells, "width", "d_model", str, optional=False),
        each(cells, "heads", "heads", str, optional=False),
        each(cells, "depth", "depth", str, optional=False),
        *training_columns(cells, varying(cells, TRAINING)),
        each(cells, "tokens trained", "tokens_trained", units.count),
        Column("perplexity", [plus_minus(r["perplexity_mean"], r["perplexity_std"]) for r in rows]),
        Column("reset", [plus_minus(r["perplexity_reset_mean"], r["perplexity_reset_std"]) for r in rows]),
        each(cells, "stride", "eval_stride", units.whole),
        each(cells, "context ≥", "eval_min_context", units.whole),
        Column("looks back", [_context(row) for row in rows]),
        each(cells, "bits per byte", "bits_per_byte_mean", units.score),
        each(cells, "word perplexity", "word_perplexity_mean", units.score),
        each(cells, "unigram", "unigram_perplexity", units.score),
        each(cells, "state", "state_policy", or_dash, right=False),
        each(cells, "replicates", "quality_replicates", str, optional=False),
    ]


def training_columns(cells: pd.DataFrame, apart: Sequence[str]) -> list[Column]:
    """Columns for those keys of `TRAINING`."""
    columns = []
    if {"train_budget", "train_amount"} & set(apart):
        pairs = zip(cells["train_budget"], cells["train_amount"], strict=True)
        columns.append(Column("budget", [units.budget(kind, amount) for kind, amount in pairs]))
    if "learning_rate" in apart:
        columns.append(each(cells, "learning rate", "learning_rate", units.learning_rate))
    if "eval_split" in apart:
        columns.append(each(cells, "split", "eval_split", or_dash, right=False))
    return columns


def parameters(cells: pd.DataFrame) -> str:
    """Parameter counts, one row a variant and model; lengths share a row where they share a count."""
    known = cells[cells["params"].notna()]
    keys = ["objective", "corpus", "d_model", "heads", "depth"]
    found = known.groupby([*keys, "variant", "label", "params"], sort=False)
    table = pd.DataFrame(
        {"params_ratio": found["params_ratio"].median(), "lengths": found["seq_len"].agg(_lengths)}
    ).reset_index()
    if table.empty:
        return ""
    drift = [DRIFT if abs(value - 1) > DRIFT_LIMIT else "" for value in table["params_ratio"]]
    ratios = [units.ratio(v) + mark for v, mark in zip(table["params_ratio"], drift, strict=True)]
    names = {"d_model": "width"}
    return markdown.table(
        [
            each(table, "variant", "label", str, right=False, optional=False),
            *(each(table, names.get(k, k), k, str) for k in keys if k in varying(table, keys)),
            Column("parameters", [f"{int(value):,}" for value in table["params"]]),
            Column("/ dense", ratios),
            each(table, "lengths", "lengths", str, right=False),
        ]
    )


def _lengths(values: pd.Series[Any]) -> str:
    return ", ".join(str(v) for v in sorted(values.unique()))


def gates(frame: pd.DataFrame) -> str:
    """One row a variant configuration: what its gates found, worst over its records."""
    where = ["objective", "dtype", "device"]
    found = frame.groupby([*where, "variant", "label", "params_json", "impl"], sort=True)
    table = pd.DataFrame(
        {
            "leak": found["leak_max_abs"].max(),
            "reference": found["reference_max_abs"].max(),
            "low": found["cost_ratio"].min(),
            "high": found["cost_ratio"].max(),
            "why": found["cost_ratio_reason"].agg(distinct),
            "leaks": found["leaks"].any(),
        }
    ).reset_index()
    rows = [row for _, row in table.iterrows()]
    cost_ratios = [units.ratios(row["low"], row["high"]) for row in rows]
    return markdown.table(
        [
            Column("variant", [label_of(row) for row in rows], right=False, optional=False),
            *(each(table, key, key, str, right=False) for key in varying(table, where)),
            Column("parameters", [_knobs(row) for row in rows], right=False),
            each(table, "leak (max abs)", "leak", units.scientific, optional=False),
            each(table, "reference error (max abs)", "reference", units.scientific, optional=False),
            Column("counted / formula", cost_ratios, optional=False),
            each(table, "because", "why", or_dash, right=False),
        ]
    )


def _knobs(row: pd.Series[Any]) -> str:
    knobs = json.loads(row["params_json"]) | ({} if row["impl"] == UNKNOWN else {"impl": row["impl"]})
    return ", ".join(f"{name}={spoken(value)}" for name, value in knobs.items()) or units.MISSING


def or_dash(value: object) -> str:
    text = "" if value is None or value != value else str(value)
    return markdown.shortened(text) or units.MISSING


def trained(row: pd.Series[Any]) -> str:
    """On what and on how much a row's model was trained, and how it was scored: '400 k tokens, test'."""
    values = {key: row[key] for key in (*TRAINING, "seq_len")}
    known = [key for key in TRAINING if key != "learning_rate" and not pd.isna(values[key])]
    return ", ".join(training(values, known))


def failed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a failure: the keys, `status`, `reason` and the replicates that say the same, in words."""
    rows = frame[frame["status"] != "ok"]
    rows = rows.assign(reason=rows["reason"].fillna("no reason recorded"))
    keys = [*GROUP, *TRAINING, "label", "seq_len", "status", "reason"]
    found = rows.groupby(keys, sort=True, dropna=False)["replicate"].agg(
        lambda v: ", ".join(str(r) for r in sorted(v))
    )
    return found.reset_index()


def failures(frame: pd.DataFrame) -> str:
    """Every record that is not ok, with its reason; replicates that say the same share a row."""
    table = failed(frame)
    if table.empty:
        return ""
    apart = [key for key in TRAINING if frame[key].nunique() > 1]
    return markdown.table(
        [
            each(table, "variant", "label", str, right=False, optional=False),
            each(table, "length", "seq_len", str, optional=False),
            each(table, "depth", "depth", str, optional=False),
            *(each(table, key, key, str, right=False) for key in varying(frame, SETTING)),
            *training_columns(table, apart),
            each(table, "replicates", "replicate", str, optional=False),
            each(table, "status", "status", str, right=False, optional=False),
            each(table, "reason", "reason", or_dash, right=False, optional=False),
        ]
    )


def headed(cells: pd.DataFrame, keys: Sequence[str] = GROUP) -> list[tuple[str, str, pd.DataFrame]]:
    """The cells by group: a heading of what tells the groups apart, all keys in words, the part."""
    named = [k for k in keys if k in ("objective", "depth") or k in varying(cells, keys)]
    return [(describe(values, named), describe(values, keys), part) for values, part in split(cells, keys)]
