"""The cost of generating as tables."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import SLOT_COLUMNS, varying
from bench.report.data.statistics import BASELINE
from bench.report.text import units
from bench.report.text.columns import Column, each
from bench.report.text.marks import CONTAMINATED


def tokens(cells: pd.DataFrame) -> list[Column]:
    """A row a variant and length, within one group; takes `decoding_cells`."""
    rows = [row for _, row in cells.iterrows()]
    return [
        each(cells, "variant", "label", str, right=False, optional=False),
        each(cells, "context", "seq_len", units.length, optional=False),
        Column("time a token", [timed(row, "decode_seconds_median") for row in rows]),
        each(cells, "/ dense", "token_ratio", units.ratio),
        Column("95 % of tokens below", [timed(row, "decode_seconds_p95") for row in rows]),
        Column("a token of a block", [timed(row, "decode_token_of_block") for row in rows]),
        Column("the prompt", [timed(row, "prefill_seconds_median") for row in rows]),
        each(cells, "prompt / dense", "prefill_ratio", units.ratio),
        each(cells, "state", "decode_state_bytes", units.size),
        each(cells, "state / dense", "state_ratio", units.ratio),
        each(cells, "peak", "decode_peak_bytes", units.size),
        each(cells, "peak of the prompt", "prefill_peak_bytes", units.size),
        each(cells, "bytes moved", "decode_bytes_moved", units.size),
        each(cells, "of the copy rate", "bandwidth_share", units.share),
        each(cells, "launches", "decode_launches", units.count),
        each(cells, "largest batch", "decode_largest_batch", units.whole),
        Column("tokens a second with it", [rate(row) for row in rows]),
        each(cells, "replicates", "replicates", str, optional=False),
    ]


def combinations(cells: pd.DataFrame) -> list[Column]:
    """A row a variant with its layers in the slots, and length; dense first. Takes `data.combinations` of one
    group."""
    slots = varying(cells, list(SLOT_COLUMNS.values()))
    cells = cells.assign(later=cells["variant"] != BASELINE)
    cells = cells.sort_values(["seq_len", "later", "label", *slots], kind="stable")
    rows = [row for _, row in cells.iterrows()]
    titles = {"feed_forward_layer": "feed-forward", "depth_schedule": "depth schedule"}
    return [
        each(cells, "variant", "label", str, right=False, optional=False),
        *(each(cells, titles[slot], slot, str, right=False, optional=False) for slot in slots),
        each(cells, "context", "seq_len", units.length, optional=False),
        Column("time a token", [timed(row, "decode_seconds_median") for row in rows], optional=False),
        each(cells, "speed-up", "speedup", units.ratio, optional=False),
        each(cells, "weights", "decode_weight_bytes", units.size),
        each(cells, "bytes moved", "decode_bytes_moved", units.size),
        each(cells, "launches", "decode_launches", units.count),
        each(cells, "replicates", "replicates", str, optional=False),
    ]


def timed(row: pd.Series[Any], column: str) -> str:
    text = units.seconds(row[column])
    return text + CONTAMINATED * (bool(row[DISTURBED]) and text != units.MISSING)


def rate(row: pd.Series[Any]) -> str:
    text = units.rate(row["decode_batch_rate"])
    return text + CONTAMINATED * (bool(row[DISTURBED]) and text != units.MISSING)


def crossings(cells: pd.DataFrame) -> list[Column]:
    """A row a variant, within one group; takes `cheaper_from`."""
    return [
        each(cells, "variant", "label", str, right=False, optional=False),
        Column(
            "a token is cheaper than dense's", [_outcome(row) for _, row in cells.iterrows()], right=False
        ),
        each(cells, "time at the longest / shortest context", "growth", units.ratio),
    ]


def _outcome(row: pd.Series[Any]) -> str:
    length = units.digits(row["length"])
    return {
        "always": f"from {units.length(row['first'])} on, the shortest",
        "never": f"never up to {units.length(row['last'])}",
        "from": f"from {length} on",
        "until": f"up to {length} alone",
    }[row["outcome"]]
