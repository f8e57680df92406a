"""The decoding cells as data for the page's chooser, which advises readers who generate."""

from __future__ import annotations

import pandas as pd

from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import SETTING, split, varying
from bench.report.figures.chart_data import Json, lengths, numbers
from bench.report.sections.decoding.tables import rate, timed
from bench.report.text import units
from bench.report.text.phrases import describe


def generating(cells: pd.DataFrame) -> Json:
    """Lists with one entry a cell; takes `decoding_cells`, which are not empty.

    `settings` are what cells must share to be compared, in words; `setting` is each cell's place among them.
    `token` is the time of a token in seconds, `rate` the tokens a second of the largest batch; a figure that
    was not taken is null. `memory` is the peak of a step, with the weights.
    """
    rows = [row for _, row in cells.iterrows()]
    settings = [values for values, _ in split(cells, SETTING)]
    varying_keys = varying(cells, SETTING)
    places = {tuple(values[key] for key in SETTING): place for place, values in enumerate(settings)}
    return {
        "settings": [describe(values, varying_keys) or describe(values, SETTING) for values in settings],
        "setting": [places[key] for key in cells[list(SETTING)].itertuples(index=False, name=None)],
        "label": list(cells["label"]),
        "length": [int(length) for length in cells["seq_len"]],
        "depth": [int(depth) for depth in cells["depth"]],
        "disturbed": [bool(value) for value in cells[DISTURBED]],
        "token": numbers(cells["decode_seconds_median"]),
        "token_text": [timed(row, "decode_seconds_median") for row in rows],
        "token_ratio_text": [units.ratio(value) for value in cells["token_ratio"]],
        "state": numbers(cells["decode_state_bytes"]),
        "state_text": [units.size(value) for value in cells["decode_state_bytes"]],
        "memory": numbers(cells["decode_peak_bytes"]),
        "memory_text": [units.size(value) for value in cells["decode_peak_bytes"]],
        "rate": numbers(cells["decode_batch_rate"]),
        "rate_text": [rate(row) for row in rows],
        "batch_text": [units.whole(value) for value in cells["decode_batch_size"]],
        "lengths": dict(lengths(list(cells["seq_len"]))),
    }
