"""Trained models with fewer attention heads, or with fewer visits of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.report.data.experiment import Experiment
from bench.report.data.groups import CELL, SETTING, TRAINING, varying
from bench.report.data.kinds import with_lists
from bench.report.figures.baselines import in_loss_unit, loss_unit
from bench.report.figures.families import Family, Line, draw_family, over_replicates
from bench.report.figures.lines import Look
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.text import units
from bench.report.text.cells import plus_minus, training_columns
from bench.report.text.columns import Column, each
from bench.report.text.phrases import headed
from bench.report.text.tables import Table

KINDS = ("heads", "visits")
"""What is removed: the records have a list of numbers that are kept, and one of losses, for each."""


class Pruning(Section[pd.DataFrame]):
    """Its data are the records with a loss after pruning; empty where no cell asked for it."""

    name = "pruning"
    order = 106
    title = "Pruning"
    lead = (
        "The loss of a trained model from which parts are removed, without further training "
        "(`measure.prune_windows`). *heads*: attention heads, those with the least importance first (Michel "
        "et al. 2019). *visits*: every fourth or every second visit of a block (LayerDrop, Fan et al. 2019). "
        "*− all*: the mean difference to the whole model."
    )

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """The records of either kind."""
        frame = records.kinds.plain
        found = [_pruned(frame, kind).index for kind in KINDS]
        return frame.loc[found[0].union(found[1], sort=False)]

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """A table a data set, model size and kind."""
        return [
            Table(_columns(part, kind), f"{kind}: {heading}")
            for kind in KINDS
            for _, heading, part in _groups(data, kind)
        ]

    def figures(self, data: pd.DataFrame) -> list[FigureSpec]:
        """Loss against the share that is kept."""
        return [
            FigureSpec(f"pruned_{kind}", _title(kind), data, drawing(kind), SETTING)
            for kind in KINDS
            if len(_pruned(data, kind))
        ]


def _pruned(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The finished records with both lists of this kind, a loss for each number that is kept."""
    losses, kept = f"nll_{kind}_kept", f"{kind}_kept"
    whole = with_lists(frame, losses, kept)
    return whole[whole[losses].map(len) == whole[kept].map(len)]


def _losses(own: pd.DataFrame, kind: str) -> pd.DataFrame:
    """A row a record and a column a number that is kept, in the unit of losses."""
    nats = pd.DataFrame(own[f"nll_{kind}_kept"].tolist()).astype(float)
    return nats.mul(in_loss_unit(own).to_numpy(), axis=0)


def _groups(data: pd.DataFrame, kind: str) -> list[tuple[str, str, pd.DataFrame]]:
    own = _pruned(data, kind)
    return headed(own, ("objective", "corpus", "d_model", "heads")) if len(own) else []


def _columns(records: pd.DataFrame, kind: str) -> list[Column]:
    """A row for each model and number that is kept."""
    keys = [key for key in (*CELL, *TRAINING) if key != "variant"]
    rows: list[dict[str, Any]] = []
    for values, own in records.groupby(keys, sort=False, dropna=False):
        losses = _losses(own, kind)
        for place, kept in enumerate(own[f"{kind}_kept"].iloc[0]):
            rows.append(
                {
                    **dict(zip(keys, values, strict=True)),
                    "kept": f"{kept} of {own[f'{kind}_kept'].iloc[0][0]}",
                    "mean": losses[place].mean(),
                    "std": losses[place].std(ddof=1),
                    "extra": (losses[place] - losses[0]).mean() if place else math.nan,
                    "replicates": len(own),
                }
            )
    table = pd.DataFrame(rows)
    shown = [key for key in varying(table, keys) if key not in (*TRAINING, "label", "seq_len", "depth")]
    return [
        each(table, "variant", "label", str, right=False, optional=False),
        *(each(table, key.replace("_", " "), key, str, right=False) for key in shown),
        each(table, "length", "seq_len", str, optional=False),
        each(table, "depth", "depth", str, optional=False),
        *training_columns(table, varying(table, TRAINING)),
        each(table, f"{kind} kept", "kept", str, optional=False),
        Column(
            loss_unit(records), [plus_minus(*pair) for pair in zip(table["mean"], table["std"], strict=True)]
        ),
        Column("− all", [units.difference(extra, None, None) for extra in table["extra"]]),
        each(table, "replicates", "replicates", str, optional=False),
    ]


def _title(kind: str) -> str:
    return f"Loss with fewer {kind}"


def drawing(kind: str) -> Callable[[pd.DataFrame, Look], Figure | None]:
    """A function that draws the loss against the share of heads, or of visits, that is kept."""
    return partial(_draw, kind=kind)


def _draw(frame: pd.DataFrame, look: Look, *, kind: str) -> Figure | None:
    """A line a variant over the share of heads or visits that is kept."""
    frame = _pruned(frame, kind)
    family = Family(
        title=_title(kind),
        x=f"{kind} that are kept",
        y=loss_unit(frame) if len(frame) else "",
        footer="mean and min–max over {}; not trained again",
        line=partial(_line, kind=kind),
        axis=_shares,
    )
    return draw_family(frame, look, family)


def _line(own: pd.DataFrame, *, kind: str) -> Line | None:
    kept = pd.Series(own[f"{kind}_kept"].iloc[0], dtype=float)
    return over_replicates(_losses(own, kind).to_numpy().tolist(), (kept / kept[0]).to_numpy())


def _shares(axis: Axes, _largest: float) -> None:
    axis.set_xlim(1.02, 0)  # the whole model is on the left
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


SECTIONS: Sequence[Section[Any]] = (Pruning(),)
