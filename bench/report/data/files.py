"""The files of a report for programs: tables as CSV, all records as Parquet."""

from __future__ import annotations

import io
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

import pandas as pd

from bench import records
from bench.records import Record, Status

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
    """Every readable record, one row each, one column a key, parameters as JSON text; `stale` has the reason
    why the tables leave out a record.

    Types do not depend on which cells are null: counts are Int64, figures and FLOPs (which can exceed 64
    bits) double, texts string.
    """
    columns: dict[str, Any] = records.columns_of(found)
    for name in (name for name in columns if name.endswith("_params")):
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
