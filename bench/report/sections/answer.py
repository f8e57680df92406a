"""The answer first: at each length the fastest variants, those with the least memory, and the best models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import DISTURBED
from bench.report.data.experiment import Experiment
from bench.report.data.groups import BUDGET, GROUP, TRAINING, split
from bench.report.data.kinds import KEEP
from bench.report.sections import Section
from bench.report.text import units
from bench.report.text.cells import or_dash, plus_minus
from bench.report.text.columns import Column
from bench.report.text.phrases import describe, training
from bench.report.text.tables import Table

MOST_ROWS = 16
"""Rows of a table; more do not fit on one screen."""
MOST_NAMES = 4
"""Names in a cell of a table."""
SAME_MEMORY = 1.02
"""Peak memory that is larger by less than this factor counts as the same."""


@dataclass(frozen=True)
class Answers:
    """A row a length of a group: `fastest` and `least_memory` are labels with ratios to dense; and a row a
    pool of models, whose `best` are those that none is certainly better than."""

    costs: list[dict[str, Any]]
    models: list[dict[str, Any]]


class Answer(Section[Answers]):
    """Only tables; the figures that belong to it are those of other sections that are `front`."""

    name = "answer"
    order = 1
    title = "Which one?"
    needs = ("cost", "quality")
    front = True
    figures_first = False
    figures_alone = False
    lead = (
        "Variants in one cell of a table are ties: nothing measured here tells them apart. *fastest*: whose "
        "training step takes at most the machine's noise floor longer than the shortest one. Where the "
        "fastest is not certainly different from dense, dense is named too. Without cells that were measured "
        "twice, the noise floor is not known, and the shortest time stands alone. *least memory*: whose peak "
        f"is at most {100 * (SAME_MEMORY - 1):.0f} % above the lowest. In parentheses is the ratio to dense "
        "attention. *best*: trained models that no other is certainly better than (see *Quality*)."
    )

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Answers:
        """Of the costs and the ranks, without what leaks and, where several strategies for activations were
        measured, with activations kept."""
        costs: pd.DataFrame = done["cost"]
        if KEEP in set(costs["activations"]):
            costs = costs[costs["activations"] == KEEP]
        return Answers(_costs(costs[~costs["leaks"]]), _models(done["quality"].cells))

    def tables(self, data: Answers) -> list[Table]:
        """One of costs, one of models."""
        return [
            *(_table("Cost of a training step", data.costs, ("fastest", "least memory"))),
            *(_table("Trained models", data.models, ("trained", "best", "score", "3-gram"))),
        ]


def _costs(cells: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for values, own in split(cells, (*GROUP, "seq_len")) if len(cells) else ():
        if own["label"].nunique() < 2:
            continue
        sound = own[~own[DISTURBED]] if (~own[DISTURBED]).any() else own
        seconds = sound[f"{SECONDS}_median"].astype(float)
        floor = float(sound["noise_floor"].fillna(1.0).max())
        peak = own["peak_bytes_median"].fillna(own["peak_bytes_predicted"]).astype(float)
        if seconds.isna().all() and peak.isna().all():  # no step was measured
            continue
        rows.append(
            {
                "setting": describe(values, ("objective", "corpus", "d_model", "batch_size")),
                "length": values["seq_len"],
                "depth": values["depth"],
                "fastest": _listed(sound, _fastest(sound, seconds, floor), f"{SECONDS}_ratio"),
                "least memory": _listed(own, peak[peak <= SAME_MEMORY * peak.min()], "peak_bytes_ratio"),
                "variants": own["label"].nunique(),
            }
        )
    return _most(rows)


def _models(cells: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for values, own in split(cells, BUDGET) if len(cells) else ():
        own = own[~own["is_other_rate"]]
        if own["label"].nunique() < 2:
            continue
        best = own[own["rank_low"] == 1].sort_values("nll_mean")
        keys = [key for key in TRAINING if key != "learning_rate" and not pd.isna(values[key])]
        first = best.iloc[0] if len(best) else None
        rows.append(
            {
                "setting": describe(values, ("objective", "corpus", "d_model")),
                "length": values["seq_len"],
                "depth": values["depth"],
                "trained": ", ".join(training(values, keys)),
                "best": _named([str(label) for label in best["label"]]) or "not ranked",
                "score": _range(own) if first is None else _score(first),
                "3-gram": units.score(own["ngram_3_bits_per_byte"].mean()),
                "variants": own["label"].nunique(),
            }
        )
    return _most(rows)


def _fastest(cells: pd.DataFrame, seconds: pd.Series[float], floor: float) -> pd.Series[float]:
    """The times that are at most `floor` times the shortest; also that of dense, if the fastest variant is
    not certainly different from it."""
    is_tie = seconds <= floor * seconds.min()
    is_different = cells["differs"].fillna(False).to_numpy(dtype=bool)
    if is_tie.any() and not is_different[np.nanargmin(seconds.to_numpy())]:
        is_tie |= (cells["label"] == cells["baseline"]) & seconds.notna()
    return seconds[is_tie]


def _listed(cells: pd.DataFrame, values: pd.Series[float], ratio: str) -> str:
    """The labels of these values, the least first, with their ratios to dense."""
    ratios = cells[ratio]
    return _named(
        [
            f"{cells.loc[place, 'label']}"
            + ("" if pd.isna(ratios[place]) else f" ({units.ratio(ratios[place])})")
            for place in values.sort_values().index
        ]
    )


def _named(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:MOST_NAMES])} and {more} more"


def _score(row: pd.Series[Any]) -> str:
    if not pd.isna(row["accuracy_mean"]):
        return f"accuracy {units.percent(row['accuracy_mean'])}"
    if not pd.isna(row["bits_per_byte_mean"]):
        return f"{plus_minus(row['bits_per_byte_mean'], row['bits_per_byte_std'])} bits per byte"
    return f"perplexity {plus_minus(row['perplexity_mean'], row['perplexity_std'])}"


def _range(cells: pd.DataFrame) -> str:
    """The losses of models that are not ranked."""
    low, high = cells["bits_per_byte_mean"].min(), cells["bits_per_byte_mean"].max()
    return units.MISSING if pd.isna(low) else f"{units.score(low)} to {units.score(high)} bits per byte"


def _most(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the settings with the most variants, in their order."""
    largest = sorted(rows, key=lambda row: -int(row["variants"]))[:MOST_ROWS]
    return [row for row in rows if row in largest]


def _table(heading: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Table]:
    if not rows:
        return []
    settings = {row["setting"] for row in rows}
    columns = [] if len(settings) == 1 else [Column("setting", [row["setting"] for row in rows], right=False)]
    columns += [Column(key, [str(row[key]) for row in rows], optional=False) for key in ("length", "depth")]
    columns += [Column(name, [or_dash(row[name] or None) for row in rows], right=False) for name in names]
    return [Table(columns, heading, setting=settings.pop() if len(settings) == 1 else "")]


SECTIONS: Sequence[Section[Any]] = (Answer(),)
