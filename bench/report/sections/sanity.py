"""Orderings that must appear before models are ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import BUDGET, GROUP, TRAINING, varying
from bench.report.data.orderings import SHOWN
from bench.report.sections import Section
from bench.report.text import units
from bench.report.text.cells import training_columns
from bench.report.text.columns import Column, each
from bench.report.text.listing import PageList, listed_columns
from bench.report.text.phrases import describe, training
from bench.report.text.tables import Table

SIZES = ("depth", "seq_len")
"""Keys that order the rows of the table, as they are read."""
MOST_NAMED = 3
"""Pools that a line of the head names."""


class Sanity(Section[pd.DataFrame]):
    """Data: `Ranking.orderings`, one row an ordering and pool of models."""

    name = "sanity"
    order = 55  # above the first ranking, which are the Pareto fronts
    title = "Before ranking"
    needs = ("quality",)
    lead = (
        "Orderings that models show which use a long context. Where one of them does not appear, the "
        "models were trained too little to be ranked, and no table, front or page ranks those of its "
        "length, size and budget. *difference* is the loss of the first minus that of the second, in bits "
        "per byte (of masked text in nats per token), on the same targets and replicates, with its 95 % "
        "interval over replicates and text. An ordering is *shown* if the whole interval is below the "
        "margin, *violated* if it is above it, else *not decided*."
    )
    figures_alone = False

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """What the ranking was decided by."""
        orderings: pd.DataFrame = done["quality"].ranking.orderings
        return orderings.sort_values([*SIZES], kind="stable") if len(orderings) else orderings

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """One table of all pools."""
        return [Table(_columns(data))] if len(data) else []

    def facts(self, data: pd.DataFrame) -> dict[str, str]:
        """How many of the orderings appear."""
        if data.empty:
            return {}
        shown = int((data["verdict"] == SHOWN).sum())
        return {"orderings before ranking": f"{shown} of {len(data)} shown"}

    def warnings(self, data: pd.DataFrame) -> list[str]:
        """The pools that are not ranked, and why."""
        if data.empty:
            return []
        missing = data[data["verdict"] != SHOWN]
        keys = varying(data, BUDGET)
        pools: dict[str, list[str]] = {}
        for _, own in missing.groupby(list(BUDGET), sort=False, dropna=False):
            why = "; ".join(f"{row['expected']}: {row['verdict']}" for _, row in own.iterrows())
            pools.setdefault(why, []).append(_pool(own.iloc[0], keys))
        return [f"undertrained: no ranking{_of(names)} ({why})" for why, names in pools.items()]

    def page_lists(self, data: pd.DataFrame) -> list[PageList]:
        """The same table."""
        if data.empty:
            return []
        lead = "Where one of these orderings does not appear, models are not ranked by quality."
        table = listed_columns(_columns(data))
        return [PageList("sanity", self.title, "Orderings before ranking", table, lead)]


def _of(names: Sequence[str]) -> str:
    """' of …', the first pools and how many more; nothing for the only one of a report."""
    known = [name for name in names if name]
    more = f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
    return f" of {' / '.join(known[:MOST_NAMED])}{more}" if known else ""


def _pool(row: pd.Series[Any], keys: Sequence[str]) -> str:
    values = {str(key): value for key, value in row.items()}
    named = [key for key in (*GROUP, "seq_len") if key in keys]
    words = [describe(values, named), *training(values, keys)]
    return ", ".join(filter(None, words))


def _columns(data: pd.DataFrame) -> list[Column]:
    keys = varying(data, [key for key in GROUP if key != "depth"])
    factors = data["bits_per_byte_per_nat"].fillna(1.0)
    ends = [factors * data[f"nll_difference{end}"] for end in ("", "_low", "_high")]
    intervals = [units.difference(*figures) for figures in zip(*ends, strict=True)]
    margins = [f"{margin:.3f}" for margin in factors * data["nll_margin"]]
    return [
        each(data, "ordering", "ordering", str, right=False, optional=False),
        each(data, "expected", "expected", str, right=False, optional=False),
        *(each(data, key, key, str, right=False) for key in keys),
        each(data, "length", "seq_len", str, optional=False),
        each(data, "depth", "depth", str, optional=False),
        *training_columns(data, varying(data, TRAINING_SHOWN)),
        Column("difference", intervals, optional=False),
        Column("margin", margins, optional=False),
        each(data, "verdict", "verdict", str, right=False, optional=False),
    ]


TRAINING_SHOWN = [key for key in TRAINING if key != "learning_rate"]

SECTIONS: Sequence[Section[Any]] = (Sanity(),)
