"""A training curve of bounded size, which is stored with a record.

Each row summarises the steps since the previous row. At first that is one step; when the number of rows
reaches its limit, pairs of rows are merged. Therefore a curve of any length has at most `MAX_ROWS` rows that
together cover all steps.
"""

from __future__ import annotations

import csv
import io
from typing import Any, NamedTuple

MAX_ROWS = 1000
COLUMNS = ("step", "tokens", "seconds", "learning_rate", "nll")


class Row(NamedTuple):
    """The state of training after a step. `nll` is the mean, in nats per token, over the steps since the
    previous row; each step's nll is computed before its update."""

    step: int
    seconds: float
    learning_rate: float
    nll: float


class Curve:
    """Rows of `stride` steps each, and `last`, an incomplete row of fewer steps."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.stride = 1
        self.last: Row | None = None
        self.pending = 0
        """Number of steps in `last`."""

    def add(self, row: Row) -> None:
        """Add one step."""
        if self.last is None and len(self.rows) == MAX_ROWS:
            pairs = zip(self.rows[::2], self.rows[1::2], strict=True)
            self.rows = [after._replace(nll=(before.nll + after.nll) / 2) for before, after in pairs]
            self.stride *= 2
        before = self.last.nll if self.last else 0.0
        self.pending += 1
        self.last = row._replace(nll=before + (row.nll - before) / self.pending)
        if self.pending == self.stride:
            self.rows.append(self.last)
            self.last, self.pending = None, 0

    def csv(self, step_tokens: int) -> str:
        """Return the rows as CSV with a header; `step_tokens` is the number of tokens per step."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows + ([self.last] if self.last else []):
            writer.writerow([row.step, row.step * step_tokens, *row[1:]])
        return text.getvalue()

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain Python types."""
        last = None if self.last is None else list(self.last)
        return {"rows": [list(row) for row in self.rows], "stride": self.stride, "last": last} | {
            "pending": self.pending
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.rows = [Row(*row) for row in state["rows"]]
        self.last = None if state["last"] is None else Row(*state["last"])
        self.stride, self.pending = state["stride"], state["pending"]
