"""The figures of mixtures as a table: a row a mixture, two columns a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import natural
from bench.report.sections.mixtures.data import holds
from bench.report.sections.mixtures.sources import ACCURACY, BATCH, BITS, OF_DATA, STATE, STEP, TOKEN
from bench.report.text import units
from bench.report.text.cells import plus_minus, undertrained
from bench.report.text.columns import Column
from bench.report.text.marks import ALIKE, CONTAMINATED, LEAK, UNTOLD
from bench.report.text.phrases import describe

TITLES = {
    BITS: "bits per byte",
    ACCURACY: "accuracy",
    STATE: "state",
    STEP: "step time",
    TOKEN: "time a token",
    BATCH: "tokens a second",
}
"""Figure → its title in panels and columns."""


def by_share(shown: Sequence[pd.DataFrame]) -> list[Column]:
    """A row for each mixture of the panels, dense first, then kind by kind with a growing share."""
    keys = ["kind", "share", "layers"]
    rows = pd.concat([own[keys] for own in shown]).drop_duplicates()
    order = sorted(rows.itertuples(index=False, name=None), key=lambda row: (natural(row[0]), *row[1:]))
    columns = [
        Column("other layers", [kind or units.MISSING for kind, *_ in order], right=False, optional=False),
        Column("layers", [layers for *_, layers in order], right=False, optional=False),
        Column("dense layers", [units.percent(share) for _, share, _ in order], optional=False),
    ]
    for own in shown:
        found = {tuple(row[key] for key in keys): row for _, row in own.iterrows()}
        cells = [found.get(key) for key in order]
        figure, title = own["figure"].iloc[0], title_of(own, shown)
        columns.append(Column(title, [units.MISSING if row is None else _value(row) for row in cells]))
        name = f"{title} − dense" if figure == BITS else f"{title} / dense"
        columns.append(Column(name, [units.MISSING if row is None else _against(row) for row in cells]))
    return columns


def title_of(own: pd.DataFrame, shown: Sequence[pd.DataFrame]) -> str:
    """The title of a panel's figure, with its data where several panels have this figure."""
    figure = own["figure"].iloc[0]
    several = sum(other["figure"].iloc[0] == figure for other in shown) > 1
    return TITLES[figure] + (f", {own['corpus'].iloc[0]}" if several else "")


def place(own: pd.DataFrame) -> str:
    """The setting of a panel in words."""
    first = own.iloc[0]
    data = ["corpus"] if first["figure"] in OF_DATA else []
    batch = [] if first["figure"] == BATCH else ["batch_size"]
    keys = (*data, "d_model", *batch, "seq_len")
    return describe({str(key): value for key, value in first.items()}, keys)


def places(shown: Sequence[pd.DataFrame]) -> str:
    """The settings of the figures in words."""
    words = "; ".join(f"{title_of(own, shown)}: {place(own)}" for own in shown)
    return f"{words[0].upper()}{words[1:]}."


def _value(row: pd.Series[Any]) -> str:
    figure, value = row["figure"], row["value"]
    if figure == BITS:
        return plus_minus(value, row["deviation"]) + LEAK * (holds(row["leaks"])) + undertrained(row)
    if figure == ACCURACY:
        return units.share(value, row["deviation"]) + LEAK * (holds(row["leaks"]))
    if figure == STATE:
        return units.size(value)
    text = units.rate(value) if figure == BATCH else units.seconds(value)
    return text + CONTAMINATED * (holds(row[DISTURBED]))


def _against(row: pd.Series[Any]) -> str:
    """The difference or the ratio to dense, marked where it is not called different."""
    figure = row["figure"]
    if row["kind"] == "" or (figure == BITS and pd.isna(row["difference"])):
        return units.MISSING
    text = units.ratio(row["ratio"])
    if figure == BITS:
        text = units.difference(row["difference"], row["difference_low"], row["difference_high"])
    if figure not in (BITS, STEP) or text == units.MISSING:
        return text
    return text + (UNTOLD if pd.isna(row["differs"]) else "" if row["differs"] else ALIKE)
