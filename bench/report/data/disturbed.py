"""Which measurements of a cell take part in its figures of time, if something else disturbed some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

DISTURBED = "disturbed"
"""Column of measurements, ratios and cells: whether the time is that of a contaminated record, or rests on
one. A ratio is disturbed if either side is."""

RATIO_DISTURBED = "ratio_disturbed"
"""Column of cells: the same of their ratios, where the cell has both."""


def marked(frame: pd.DataFrame) -> pd.DataFrame:
    """The records with the column `DISTURBED`."""
    return frame.assign(**{DISTURBED: frame["contaminated"].notna()})


def takes_part(rows: pd.DataFrame, cell: Sequence[str]) -> pd.Series[bool]:
    """Whether each row takes part in the figures of its cell, which the columns `cell` identify.

    Undisturbed rows do. Disturbed ones do only where the cell has no others: its figure then has a mark.
    """
    sound = (~rows[DISTURBED]).groupby([rows[key] for key in cell], sort=False, dropna=False)
    part: pd.Series[bool] = ~rows[DISTURBED] | ~sound.transform("any")
    return part


def one_a_round(rows: pd.DataFrame, cell: Sequence[str]) -> pd.DataFrame:
    """The rows that take part in the figures of their cells, of one twin in each replicate.

    That is the first twin; where it is disturbed, the first undisturbed one.
    """
    if rows.empty:
        return rows
    own = [rows[key] for key in (*cell, "replicate")]
    order = rows[DISTURBED].astype(int) * (rows["twin"].max() + 1) + rows["twin"]
    first: pd.DataFrame = rows[order == order.groupby(own, sort=False, dropna=False).transform("min")]
    return first[takes_part(first, cell)]


def flags(rows: pd.DataFrame, cell: list[str]) -> pd.Series[Any]:
    """By cell: whether the figures of these rows, which take part, need the mark."""
    return rows.groupby(cell, sort=False, dropna=False)[DISTURBED].any()


def with_ratios(
    rows: pd.DataFrame, reference: pd.DataFrame, peers: Sequence[str], figures: Mapping[str, str]
) -> pd.DataFrame:
    """The rows with ratios to the reference that shares the keys `peers`, and `RATIO_DISTURBED`.

    `figures` maps a figure to the column of its ratio. Of several references their median counts; NaN where
    there is none.
    """
    groups = reference.groupby(list(peers))
    index = pd.MultiIndex.from_frame(rows[list(peers)])
    against = groups[list(figures)].median().reindex(index)
    ratios = {
        ratio: rows[figure].to_numpy() / against[figure].where(against[figure] > 0).to_numpy()
        for figure, ratio in figures.items()
    }
    flagged = groups[DISTURBED].any().reindex(index).eq(True).to_numpy()
    return rows.assign(**ratios, **{RATIO_DISTURBED: rows[DISTURBED].to_numpy() | flagged})


def undisturbed_medians(
    rows: pd.DataFrame, cell: list[str], figures: Mapping[str, str], *, timed: Sequence[str]
) -> pd.DataFrame:
    """The medians by cell of the figures and their ratios, as `with_ratios` gives them, and both flags.

    Of the figures in `timed` and of their ratios, only those rows count that take part.
    """
    groups = rows.groupby(cell, sort=False, dropna=False)
    cells = groups[[*figures, *figures.values()]].median()
    for names, flag in (
        (list(timed), DISTURBED),
        ([figures[name] for name in timed], RATIO_DISTURBED),
    ):
        known = rows[rows[names].notna().any(axis=1)]
        own = known[takes_part(known.assign(**{DISTURBED: known[flag]}), cell)]
        part = own.groupby(cell, sort=False, dropna=False)
        cells[names] = part[names].median()
        cells[flag] = part[flag].any()
        cells[flag] = cells[flag].eq(True)
    return cells
