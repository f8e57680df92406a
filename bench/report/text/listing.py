"""Plain tables of the page: texts in rows, not escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.text import units
from bench.report.text.columns import Column, shown
from bench.report.text.markdown import shortened
from bench.report.text.tables import Table

TITLES = {"label": "variant", "seq_len": "length", "d_model": "width", "batch_size": "batch"}


@dataclass(frozen=True)
class Listed:
    """A table as texts, not escaped."""

    titles: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class PageList:
    """A table of the page under a heading; one without rows is left out.

    `anchor` is its place in the page's address, `title` its heading, which lists that follow each other may
    share, `caption` its name for a screen reader, `lead` a paragraph above it, `setting` a heading of what
    its rows share. With `about_noise` it is part of the page's section on noise and environment, and no
    section of its own.
    """

    anchor: str
    title: str
    caption: str
    table: Listed
    lead: str = ""
    about_noise: bool = False
    setting: str = ""


def listed_tables(anchor: str, title: str, tables: Sequence[Table], lead: str = "") -> list[PageList]:
    """The tables of a section under one title, each with its own heading."""
    return [
        PageList(
            f"{anchor}-{place}" if place > 1 else anchor,
            title,
            table.heading or title,
            listed_columns(table.columns),
            lead if place == 1 else "",
            setting=table.heading,
        )
        for place, table in enumerate(tables, 1)
    ]


def listed(frame: pd.DataFrame, columns: Sequence[str]) -> Listed:
    """Those columns of the frame; a null is a dash."""
    titles = [TITLES.get(name, name.replace("_", " ")) for name in columns]
    return Listed(
        titles, [[_text(value) for value in row] for row in frame[list(columns)].itertuples(index=False)]
    )


def listed_columns(columns: Sequence[Column]) -> Listed:
    """The columns of a table of summary.md."""
    shown_columns = shown(columns)
    return Listed(
        [c.title for c in shown_columns],
        [list(row) for row in zip(*(c.cells for c in shown_columns), strict=True)],
    )


def _text(value: Any) -> str:
    return units.MISSING if pd.isna(value) or value == "" else shortened(str(value))
