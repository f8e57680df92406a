"""The rows of the page's chooser for those who generate."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import SETTING, varying
from bench.report.figures.chart_data import Json, number
from bench.report.sections.decoding.tables import rate, timed
from bench.report.text import units
from bench.report.text.phrases import describe


def chooser(cells: pd.DataFrame) -> Json:
    """`settings` in words, and `cells`, each with its place among them; takes `decoding_cells`.

    Times and sizes to sort by are in seconds and bytes; those to read are the texts of the tables.
    """
    if cells.empty:
        return {"settings": [], "cells": []}
    keys = cells[list(SETTING)].drop_duplicates()
    named = varying(cells, SETTING) or ["batch_size"]
    values = keys.to_dict("records")
    places = {key: place for place, key in enumerate(keys.itertuples(index=False, name=None))}
    of_cells = cells[list(SETTING)].itertuples(index=False, name=None)
    rows = zip(of_cells, (row for _, row in cells.iterrows()), strict=True)
    return {
        "settings": [describe({str(key): value for key, value in one.items()}, named) for one in values],
        "cells": [_cell(places[key], row) for key, row in rows],
    }


def _cell(setting: int, row: pd.Series[Any]) -> Json:
    return {
        "setting": setting,
        "label": row["label"],
        "length": int(row["seq_len"]),
        "depth": int(row["depth"]),
        "disturbed": bool(row[DISTURBED]),
        "token": number(row["decode_seconds_median"]),
        "token_text": timed(row, "decode_seconds_median"),
        "ratio_text": units.ratio(row["token_ratio"]),
        "prompt_text": timed(row, "prefill_seconds_median"),
        "state": number(row["decode_state_bytes"]),
        "state_text": units.size(row["decode_state_bytes"]),
        "peak": number(row["decode_peak_bytes"]),
        "peak_text": units.size(row["decode_peak_bytes"]),
        "batch_text": units.whole(row["decode_largest_batch"]),
        "rate_text": rate(row),
    }
