"""The sizes that fit, and the throughput at the largest batch, as plain tables of the page."""

from __future__ import annotations

import pandas as pd

from bench.report.data.groups import FIT, PAYOFF, varying
from bench.report.sections.budgets.tables import largest, longest
from bench.report.text import units
from bench.report.text.listing import TITLES, Listed, listed
from bench.report.text.marks import interval, timed


def listed_fits(cells: pd.DataFrame) -> Listed:
    """The sizes that are predicted to fit into a memory budget; takes `fits_cells`."""
    if cells.empty:
        return Listed([], [])
    rows = cells.assign(
        budget=[units.size(value, short=True) for value in cells["budget_bytes"]],
        **{
            "longest sequence": [longest(row) for _, row in cells.iterrows()],
            "largest batch": [largest(row) for _, row in cells.iterrows()],
        },
    )
    varying_keys = [
        key for key in varying(cells, FIT) if key not in ("budget_bytes", "seq_len", "batch_size")
    ]
    names = ["label", "activations", "depth", *varying_keys, "budget"]
    return listed(rows, [*names, "batch_size", "longest sequence", "seq_len", "largest batch"])


def listed_payoff(cells: pd.DataFrame) -> Listed:
    """The throughput of training at the largest batch that fits; takes `payoff_cells`."""
    if cells.empty:
        return Listed([], [])
    rows = [row for _, row in cells.iterrows()]
    shown = pd.DataFrame(
        {
            **{TITLES.get(key, key): cells[key] for key in ("label", "activations", "seq_len", "depth")},
            **{key: cells[key] for key in varying(cells, PAYOFF) if key not in ("budget_bytes", "seq_len")},
            "budget": [units.size(value, short=True) for value in cells["budget_bytes"]],
            "largest batch": [largest(row) for row in rows],
            "throughput": [timed(row, "tokens_per_second", units.rate) for row in rows],
            "95 % interval": interval(rows, "tokens_per_second", "rate"),
            "/ keep": [units.ratio(value) for value in cells["gain"]],
            "replicates": cells["replicates"],
            "status": cells["status"],
        }
    )
    return listed(shown, list(shown.columns))
