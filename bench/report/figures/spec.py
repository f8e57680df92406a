"""A kind of figure: its drawing function, its cells, and the keys of which each value is one figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from bench.report.figures.lines import Look

Draw = Callable[[pd.DataFrame, Look], Figure | None]


def _always(_values: Mapping[str, Any], _cells: pd.DataFrame) -> bool:
    return True


def _nobody(_cells: pd.DataFrame) -> Iterable[str]:
    return ()


def _shown(_values: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class FigureSpec:
    """One kind of figure; there is one figure for each value of `keys` among `cells`.

    `stem` is the beginning of the file name. `draw` makes a figure of the cells of one setting, or returns
    None if there is nothing to draw. `kind` names the records (a field of `bench.report.data.kinds.Kinds`)
    whose machines and dates are in the footer, and whose differing keys are part of the file name. A
    setting is omitted if `condition` returns False for its keys and cells. If `linked` returns a text,
    summary.md has a link with this text instead of the image. A `front` figure belongs to the answer, at the
    beginning of summary.md. Of many variants, a figure has those of `figures.selection`, unless
    `all_variants`: then each is a row or a panel of its own. Of a setting's cells, `always` returns variants
    that are drawn in any case.
    """

    stem: str
    title: str
    cells: pd.DataFrame
    draw: Draw
    keys: Sequence[str]
    kind: Literal["plain", "fits", "payoff", "decoding"] = "plain"
    condition: Callable[[Mapping[str, Any], pd.DataFrame], bool] = _always
    linked: Callable[[Mapping[str, Any]], str] = _shown
    front: bool = False
    all_variants: bool = False
    always: Callable[[pd.DataFrame], Iterable[str]] = _nobody


@dataclass(frozen=True)
class Drawn:
    """A figure that was written: its title, its path relative to the report without suffix, the words under
    which it is linked (empty: it is shown), and whether it is `front`."""

    title: str
    path: str
    linked: str = ""
    front: bool = False


def one_point(cells: pd.DataFrame) -> bool:
    """Whether all cells have one length and one depth."""
    return len(cells[["seq_len", "depth"]].drop_duplicates()) == 1
