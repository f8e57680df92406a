"""One row a cell: its cost, and the quality of its best training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.groups import CELL, COMMON, split
from bench.report.text.phrases import trained


@dataclass(frozen=True)
class Cells:
    """`summary` is `statistics.summary`, a row a cell and training; `rows` are `best_trained`, one a cell."""

    summary: pd.DataFrame
    rows: pd.DataFrame

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The values of `COMMON` among the rows, in order: the keys that cells must share to be compared."""
        return [values for values, _ in split(self.rows, COMMON)] if len(self.rows) else []

    @property
    def places(self) -> Mapping[tuple[Any, ...], int]:
        """The values of `COMMON` → their place among the settings."""
        return {tuple(values[key] for key in COMMON): place for place, values in enumerate(self.settings)}


def best_trained(cost: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """The cost cells, each with the quality of its best training, and `peak_shown`: the measured peak, else
    the predicted one.

    Of several trainings the one with the most tokens counts, scored on the split *test* if there is one; of
    its learning rates the one of the least mean loss. `trained` is this training in words; `score` is the
    accuracy, else bits per byte, else the perplexity.
    """
    cells = cost.assign(peak_shown=cost["peak_bytes_median"].fillna(cost["peak_bytes_predicted"]))
    quality = quality.drop(columns="leaks", errors="ignore")
    order = quality.assign(other=quality["eval_split"] != "test", fewer=-quality["tokens_trained"])
    order = order.sort_values(["other", "fewer", "nll_mean", "learning_rate"], kind="stable")
    best = order.drop_duplicates(list(CELL)).drop(columns=["other", "fewer"])
    words = [trained(row) for _, row in best.iterrows()]
    best = best.assign(trained=pd.Series(words, index=best.index, dtype="str"))
    cells = cells.merge(best, on=list(CELL), how="left", validate="one_to_one")
    score = cells["accuracy_mean"].fillna(cells["bits_per_byte_mean"]).fillna(cells["perplexity_mean"])
    beats = cells["beats"].map(lambda own: own if isinstance(own, tuple) else ())
    flags = {key: cells[key].eq(True) for key in ("undertrained", "unsettled")}
    return cells.assign(trained=cells["trained"].fillna(""), score=score, beats=beats, **flags)
