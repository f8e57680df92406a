"""Tables before they are text: columns of plain cells, which each format escapes in its own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.text.units import MISSING


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, its cells as text, and whether it may be left out when empty."""

    title: str
    cells: list[str]
    right: bool = True
    optional: bool = True


def each(frame: pd.DataFrame, title: str, column: str, show: Callable[[Any], str], **options: bool) -> Column:
    """A column of a table from a column of the frame, each value shown by `show`."""
    return Column(title, [show(value) for value in frame[column]], **options)


def shown(columns: Sequence[Column]) -> list[Column]:
    """The columns without the optional ones that hold only dashes."""
    return [c for c in columns if not c.optional or any(cell != MISSING for cell in c.cells)]
