"""A training curve of bounded size, as it is kept beside a record.

A row says what the steps since the row before came to: a step each at first, and where the rows become
many, pairs of them become one. So a curve of any length is a few hundred rows that leave nothing out.
"""

from __future__ import annotations

import csv
import io
from typing import Any, NamedTuple

MOST_ROWS = 1000
COLUMNS = ("step", "tokens", "seconds", "learning_rate", "nll")


class Row(NamedTuple):
    """Where training stood after a step, and the mean nll, in nats a token, of the steps since the row
    before, each taken before its update."""

    step: int
    seconds: float
    learning_rate: float
    nll: float


class Curve:
    """Rows of the same number of steps, `stride`, and the last, whose steps are not yet that many."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.stride = 1
        self.last: Row | None = None
        self.pending = 0
        """Steps in `last`."""

    def add(self, row: Row) -> None:
        """One more step."""
        if self.last is None and len(self.rows) == MOST_ROWS:
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
        """The rows under their names; `step_tokens` are the tokens of a step."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows + ([self.last] if self.last else []):
            writer.writerow([row.step, row.step * step_tokens, *row[1:]])
        return text.getvalue()

    def state_dict(self) -> dict[str, Any]:
        """In plain types."""
        last = None if self.last is None else list(self.last)
        return {"rows": [list(row) for row in self.rows], "stride": self.stride, "last": last} | {
            "pending": self.pending
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.rows = [Row(*row) for row in state["rows"]]
        self.last = None if state["last"] is None else Row(*state["last"])
        self.stride, self.pending = state["stride"], state["pending"]
