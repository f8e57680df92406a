"""A table with its heading and the words around it, before any format is chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.report.text.columns import Column

MOST_OPEN = 4
"""Tables of a section that are shown open; the reader opens the others."""


@dataclass(frozen=True)
class Table:
    """A table of the report.

    All texts but `lead` are plain, and each format escapes them. In summary.md the order is `heading`, `lead`
    (Markdown), `setting` (what all cells share), the columns, `note`; a `folded` table is opened by the
    reader. `caption` puts the table into summary.tex too; the dates of the records are added to it.
    """

    columns: list[Column]
    heading: str = ""
    lead: str = ""
    setting: str = ""
    note: str = ""
    folded: bool = False
    caption: str = ""


def first_open(tables: Iterable[Table]) -> list[Table]:
    """The tables, of which those after the first `MOST_OPEN` are folded."""
    return [replace(table, folded=place >= MOST_OPEN) for place, table in enumerate(tables)]
