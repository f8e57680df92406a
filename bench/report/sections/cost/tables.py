"""Tables of the cost of each variant at each length."""

from __future__ import annotations

import pandas as pd

from bench.report.data.compared_time import RATE, SECONDS
from bench.report.data.disturbed import RATIO_DISTURBED
from bench.report.text import units
from bench.report.text.cells import compared, label_of, or_dash, peak, time_title, wall
from bench.report.text.columns import Column, each
from bench.report.text.marks import against, interval, marked_range, sampled, timed


def cost(cells: pd.DataFrame) -> list[Column]:
    """The cost of each variant at each length, within one group."""
    rows = [row for _, row in cells.iterrows()]
    ratio_ends = [units.ratios(r[f"{SECONDS}_ratio_low"], r[f"{SECONDS}_ratio_high"]) for r in rows]
    return [
        Column("variant", [label_of(row) for row in rows], right=False, optional=False),
        each(cells, "length", "seq_len", str, optional=False),
        Column(time_title(cells), [compared(row) for row in rows]),
        Column("95 % interval", interval(rows, SECONDS, "seconds")),
        Column("time / dense", [units.ratio(r[f"{SECONDS}_ratio"]) + against(r) for r in rows]),
        Column("95 % of ratio", marked_range(ratio_ends, cells["rounds"], cells[RATIO_DISTURBED])),
        Column("sampled within", [sampled(row) for row in rows]),
        Column("wall time", [wall(row) for row in rows]),
        Column("throughput", [timed(row, f"{RATE}_median", units.rate) for row in rows]),
        Column("forward", [timed(row, "forward_seconds_median", units.seconds) for row in rows]),
        each(cells, "forward / dense", "forward_seconds_ratio", units.ratio),
        Column("utilisation", [timed(row, "mfu", units.percent) for row in rows]),
        Column("peak memory", [peak(row) for row in rows]),
        each(cells, "memory / dense", "peak_bytes_ratio", units.ratio),
        each(cells, "algorithmic FLOPs", "flops_algorithmic_step", units.flops),
        each(cells, "executed FLOPs", "flops_executed_step", units.flops),
        each(cells, "attention FLOPs", "flops_attention_step", units.flops),
        each(cells, "kernels", "attention_kernels", or_dash, right=False),
        each(cells, "launches", "launches_step", units.count),
        each(cells, "bytes moved", "bytes_moved_step", units.size),
        each(cells, "replicates", "replicates", str, optional=False),
        each(cells, "status", "status", str, right=False, optional=False),
    ]
