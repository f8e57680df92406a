"""Cells that measured decoding, aggregated over replicates, and their ratios to dense attention."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.crossing import crossing
from bench.report.data.disturbed import (
    DISTURBED,
    RATIO_DISTURBED,
    marked,
    takes_part,
    undisturbed_medians,
    with_ratios,
)
from bench.report.data.groups import CELL, GROUP, SLOT_COLUMNS, split
from bench.report.data.statistics import BASELINE
from bench.report.figures.style import ordered
from variants.slots import SLOTS

TIMES = {
    "decode_seconds_median": "token_ratio",
    "decode_seconds_p95": "p95_ratio",
    "prefill_seconds_median": "prefill_ratio",
    "decode_token_of_block": "block_ratio",
    "decode_batch_rate": "batch_ratio",
}
"""Figure of time → its ratio to dense in the same replicate."""
SIZES = {
    "decode_state_bytes": "state_ratio",
    "decode_bytes_moved": "moved_ratio",
    "decode_launches": "launches_ratio",
    "decode_peak_bytes": "peak_ratio",
    "prefill_peak_bytes": "prefill_peak_ratio",
}
OTHERS = (
    "peak_bytes_per_second",
    "decode_weight_bytes",
    "decode_largest_batch",
    "decode_batch_size",
    "decode_block",
)


def decoding_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: medians of `TIMES` and `SIZES` with their ratios, of `OTHERS`, `replicates`, and
    whether the times are `disturbed`. Empty where nothing was decoded.

    `speedup` is the time of a token of dense attention with the usual layers in all slots, over that of the
    cell: the median over replicates; NaN without such a cell in the same replicate.

    `decode_token_of_block` is the time of a block over its tokens; `decode_batch_rate` the tokens a second of
    the largest batch; `bandwidth_share` the bytes that a token moves, a second, over the rate of a copy in
    the device's memory.
    """
    cell = list(CELL)
    done = frame[(frame["status"] == "ok") & frame["decode_source"].notna()]
    if done.empty:
        return pd.DataFrame()
    done = done.assign(usual=_has_usual_layers(done))
    taken = [name for name in (*TIMES, *SIZES, *OTHERS, "usual") if name in done]
    needed = ["decode_block_seconds_median", "decode_batch_seconds_median", "replicate", "contaminated"]
    done = marked(done[[*cell, *needed, *taken]].copy())
    done = done.assign(
        decode_token_of_block=done["decode_block_seconds_median"] / done["decode_block"],
        decode_batch_rate=done["decode_batch_size"] / done["decode_batch_seconds_median"],
    )
    figures = {**TIMES, **SIZES}
    filled = done.assign(**{key: done[key].fillna("") for key in cell if done[key].isna().any()})
    filled = filled.astype(dict.fromkeys((*figures, *OTHERS), float))
    peers = [key for key in (*cell, "replicate") if key not in ("variant", "label")]
    rows = with_ratios(filled, filled[filled["variant"] == BASELINE], peers, figures)
    cells = undisturbed_medians(rows, cell, figures, timed=list(TIMES))
    groups = rows.groupby(cell, sort=False, dropna=False)
    cells[list(OTHERS)] = groups[list(OTHERS)].median()
    fastest = cells["decode_bytes_moved"] / cells["peak_bytes_per_second"]
    cells["bandwidth_share"] = fastest / cells["decode_seconds_median"]
    cells["replicates"] = groups["replicate"].nunique()
    cells["speedup"] = _speedups(filled)
    return ordered(cells.reset_index())


def _has_usual_layers(frame: pd.DataFrame) -> list[bool]:
    """Whether the model of each record has the default entries in its slots, with their default knobs."""
    usual = {name: slot.declared(slot.default).config().as_dict() for name, slot in SLOTS.items()}

    def is_usual(name: str, entry: str, text: str | None) -> bool:
        knobs = {} if pd.isna(text) else json.loads(text)
        return entry == SLOTS[name].default and all(usual[name].get(key) == own for key, own in knobs.items())

    found = [map(is_usual, [name] * len(frame), frame[name], frame[f"{name}_json"]) for name in SLOTS]
    return [all(of_row) for of_row in zip(*found, strict=True)]


def _speedups(rows: pd.DataFrame) -> pd.Series[float]:
    """By cell; see `decoding_cells`."""
    cell = list(CELL)
    peers = [k for k in (*cell, "replicate") if k not in ("variant", "label", *SLOT_COLUMNS.values())]
    reference = rows[(rows["variant"] == BASELINE) & rows["usual"]]
    rows = with_ratios(rows, reference, peers, {"decode_seconds_median": "speedup"})
    rows = rows[rows["speedup"].notna()]
    own = rows[takes_part(rows.assign(**{DISTURBED: rows[RATIO_DISTURBED]}), cell)]
    return (1 / own["speedup"]).groupby([own[key] for key in cell], sort=False, dropna=False).median()


def combinations(cells: pd.DataFrame) -> pd.DataFrame:
    """Of `decoding_cells` those with a speed-up that share all but their layers with cells whose slots have
    other entries."""
    if cells.empty:
        return cells
    slots = list(SLOT_COLUMNS.values())
    known = cells[cells["speedup"].notna()]
    others = [known[key] for key in GROUP if key not in slots]
    several = [known.groupby(others, dropna=False)[slot].transform("nunique") > 1 for slot in slots]
    return known[np.logical_or.reduce(several)]


def cheaper_from(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a variant and group with two lengths or more: `outcome` and `length` of `crossing` for the time
    of a token, and the first and last length; takes `decoding_cells`."""
    rows: list[dict[str, Any]] = []
    known = cells[cells["token_ratio"].notna() & (cells["variant"] != BASELINE)] if len(cells) else cells
    for values, own in split(known, [*GROUP, "variant", "label"]) if len(known) else ():
        own = own.sort_values("seq_len")
        if own["seq_len"].nunique() < 2:
            continue
        lengths = [float(length) for length in own["seq_len"]]
        outcome, place = crossing(lengths, list(own["token_ratio"]))
        rows.append(
            {**values, "outcome": outcome, "length": place, "first": lengths[0], "last": lengths[-1]}
            | {"growth": _growth(lengths, own["decode_seconds_median"].to_numpy(dtype=float))}
        )
    return pd.DataFrame(rows)


def _growth(lengths: list[float], seconds: np.ndarray[Any, Any]) -> float:
    """The time of a token at the longest context, over that at the shortest."""
    return float(seconds[-1] / seconds[0])
