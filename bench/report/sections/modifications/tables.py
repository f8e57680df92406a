"""Modifications as tables: all tasks side by side, each task with its costs, and rank correlations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.disturbed import DISTURBED
from bench.report.sections.modifications.data import ACCURACY, BITS
from bench.report.sections.modifications.names import DEFAULT
from bench.report.text import units
from bench.report.text.cells import or_dash, plus_minus, undertrained
from bench.report.text.columns import Column, each
from bench.report.text.marks import ALIKE, BY_CHANCE, CONTAMINATED, GUESSES, LEAK, UNTOLD

FIRST = "modification"
"""Title of the column of names."""


def overview(cells: pd.DataFrame) -> list[Column]:
    """A row a modification of one machine, the default first and then the best by its mean rank; a column a
    task. Costs are ratios to the default's, from the least to the most over the tasks."""
    defaults = cells[cells["modification"] == DEFAULT].set_index("pool")
    against = defaults.reindex(cells["pool"])
    costs = {
        "parameters": "params",
        "active": "params_active",
        "FLOPs a token": "token_flops",
        "steps a second": "steps_per_second",
    }
    for name in costs.values():
        cells = cells.assign(**{f"{name}_ratio": cells[name].to_numpy() / against[name].to_numpy()})
    by_name = {str(name): own for name, own in cells.groupby("modification", sort=False)}
    ranks = cells.groupby("modification")["rank"].mean()
    order = sorted(by_name, key=lambda name: (name != DEFAULT, *_last(ranks[name]), name))
    parts = [by_name[name] for name in order]
    columns = [
        Column(FIRST, order, right=False, optional=False),
        Column("mean rank", [units.digits(ranks[name], 2) for name in order], optional=False),
    ]
    for title, name in costs.items():
        if name == "params_active" and not _active_apart(cells):
            continue
        ratios = [own[f"{name}_ratio"] for own in parts]
        flags = [name == "steps_per_second" and bool(own[DISTURBED].any()) for own in parts]
        texts = [units.ratios(own.min(), own.max()) for own in ratios]
        columns.append(Column(title, list(map(_disturbed, texts, flags))))
    for pool, task in cells.drop_duplicates("pool")[["pool", "task"]].itertuples(index=False, name=None):
        found = [own[own["pool"] == pool] for own in parts]
        title = f"{task}: {_figure(cells[cells['pool'] == pool])}"
        columns.append(Column(title, [_final(own.iloc[0]) if len(own) else units.MISSING for own in found]))
    return columns


def _figure(own: pd.DataFrame) -> str:
    """The title of a task's final figures, with what guessing would reach."""
    figure, guess = str(own["figure"].iloc[0]), own["guess"].median()
    return figure if units.missing(guess) else f"{figure}, guessing {units.percent(guess)}"


def _disturbed(text: str, flag: bool) -> str:
    return text + CONTAMINATED if flag and text != units.MISSING else text


def _last(rank: float) -> tuple[bool, float]:
    """A sort key by which what has no rank comes last."""
    return pd.isna(rank), rank


def _active_apart(cells: pd.DataFrame) -> bool:
    """Whether a token computes with a part of a model's parameters."""
    return bool((cells["params_active"] != cells["params"])[cells["params"].notna()].any())


def of_task(own: pd.DataFrame) -> list[Column]:
    """A row a modification of one task, the default first and then the best."""
    own = own.assign(later=own["modification"] != DEFAULT).sort_values(["later", "rank", "modification"])
    rows = [row for _, row in own.iterrows()]
    share = own["early_share"].median()
    early = "early loss" if units.missing(share) else f"loss after {units.percent(share)}"
    unit = BITS if own["figure"].iloc[0] == BITS else "nats"
    return [
        each(own, FIRST, "modification", str, right=False, optional=False),
        each(own, "parameters", "params", _whole),
        *([each(own, "active", "params_active", _whole)] if _active_apart(own) else []),
        each(own, "FLOPs a token", "token_flops", units.flops),
        Column("steps a second", [_speed(row) for row in rows]),
        each(own, f"{early}, {unit}", "early", units.score),
        Column(_figure(own), [_value(row) for row in rows], optional=False),
        Column("− default", [_difference(row) for row in rows]),
        Column("learning rate", [_rate(row) for row in rows]),
        each(own, "replicates", "replicates", str, optional=False),
        Column("did not finish", [or_dash(row["unfinished"]) for row in rows], right=False),
    ]


def _whole(value: float) -> str:
    return units.MISSING if units.missing(value) else f"{int(value):,}"


def _rate(row: pd.Series[Any]) -> str:
    """The learning rate, marked where the search for it was decided by chance."""
    decided = row["rate_decided"]
    return units.learning_rate(row["learning_rate"]) + BY_CHANCE * (not pd.isna(decided) and not decided)


def _speed(row: pd.Series[Any]) -> str:
    return _disturbed(units.digits(row["steps_per_second"]), bool(row[DISTURBED]))


def _value(row: pd.Series[Any]) -> str:
    """The final figure; of a model without one, how it ended."""
    if pd.isna(row["value"]):
        return str(row["unfinished"]).partition(":")[0].partition(",")[0] or units.MISSING
    if row["figure"] == ACCURACY:
        text = units.share(row["value"], row["deviation"])
    else:
        text = plus_minus(row["value"], row["deviation"])
    return text + LEAK * bool(row["leaks"]) + undertrained(row) + GUESSES * bool(row["guesses"])


def _mark(row: pd.Series[Any]) -> str:
    """Whether the figure is called different from the default's."""
    if row["modification"] == DEFAULT or pd.isna(row["value"]) or pd.isna(row["difference"]):
        return ""
    return UNTOLD if pd.isna(row["differs"]) else "" if row["differs"] else ALIKE


def _final(row: pd.Series[Any]) -> str:
    return _value(row) + _mark(row)


def _difference(row: pd.Series[Any]) -> str:
    """The difference to the default with its interval; of accuracies in percentage points."""
    if row["modification"] == DEFAULT or pd.isna(row["difference"]):
        return units.MISSING
    ends = [row[f"difference{end}"] for end in ("", "_low", "_high")]
    if row["figure"] != ACCURACY:
        return units.difference(*ends) + _mark(row)
    texts = [f"{100 * end:+.1f}".replace("-", "−") for end in ends]
    known = not np.isnan(ends[1])
    return texts[0] + (f" ({texts[1]} to {texts[2]})" if known else "") + _mark(row)


def correlations(found: pd.DataFrame) -> list[Column]:
    """A row a pair of tasks, then a row a task against itself."""
    rows = [row for _, row in found.iterrows()]
    return [
        each(found, "task", "first", str, right=False, optional=False),
        Column("and", [_other(row) for row in rows], right=False, optional=False),
        each(found, "modifications", "modifications", str, optional=False),
        each(found, "ρ", "rho", signed, optional=False),
        Column("95 % interval", [interval_text(row) for row in rows]),
    ]


def _other(row: pd.Series[Any]) -> str:
    return "itself, another replicate" if row["seeds"] else str(row["second"])


def signed(value: float) -> str:
    """A correlation, with the minus sign of tables."""
    return units.MISSING if units.missing(value) else f"{value:.2f}".replace("-", "−")


def interval_text(row: pd.Series[Any]) -> str:
    """Both ends of a correlation's interval."""
    low, high = signed(row["rho_low"]), signed(row["rho_high"])
    return units.MISSING if pd.isna(row["rho_low"]) else f"{low} to {high}"


def family(own: pd.DataFrame) -> str:
    """The number of comparisons for which the marks of a task are corrected."""
    count = int(own["comparisons"].max())
    return f"Marks are corrected for {count} comparisons with the default." if count > 1 else ""
