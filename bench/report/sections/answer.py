"""The answer first: at each length the fastest variants, those with the least memory, and the best models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import DISTURBED
from bench.report.data.experiment import Experiment
from bench.report.data.faster import faster_than
from bench.report.data.groups import BUDGET, GROUP, SETTING, TRAINING, split, varying
from bench.report.data.intervals import of_share
from bench.report.data.kinds import KEEP
from bench.report.sections import Section
from bench.report.text import units
from bench.report.text.cells import or_dash, peak, plus_minus
from bench.report.text.columns import Column
from bench.report.text.marks import ALIKE, CONTAMINATED, PREDICTED, UNTOLD, against, meanings
from bench.report.text.phrases import describe, training
from bench.report.text.tables import Table

MOST_ROWS = 16
"""Rows of a table; more do not fit on one screen."""
MOST_NAMES = 4
"""Names in a cell of a table."""
SAME_MEMORY = 1.02
"""Peak memory that is larger by less than this factor counts as the same."""


NAMED = ("objective", "corpus", "d_model", "batch_size")
"""Keys of a setting that are always named; others are where the rows differ in them."""
UNDECIDED = "not decided"
ONLY_DISTURBED = "only disturbed times"


@dataclass(frozen=True)
class Answers:
    """A row a length of a group: `fastest` and `least memory` are labels with ratios to dense; and a row a
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
        "Variants in one cell of a table are not known to differ. *fastest*: variants that none is known to "
        "be faster than. A training step tells two apart by the machine's noise floor, where cells were "
        "measured twice, and by their ratios to dense (see *Cost*). Disturbed times decide nothing. "
        f"*{UNDECIDED}*: none is told from all others. *least memory*: whose peak is at most "
        f"{100 * (SAME_MEMORY - 1):.0f} % above the lowest. In parentheses is the ratio to dense attention. "
        "*best*: trained models that no other is certainly better than (see *Quality*); by accuracy, those "
        "whose 95 % interval (of two replicates their range) reaches that of the most accurate one, and "
        "*guessing* is the accuracy without any learning."
    )
    marks = meanings(ALIKE, UNTOLD, CONTAMINATED, PREDICTED)

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
            *(_table("Trained models", data.models, ("trained", "best", "score", "3-gram", "guessing"))),
        ]


def _costs(cells: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for values, own in split(cells, (*GROUP, "seq_len")) if len(cells) else ():
        if own["label"].nunique() < 2:
            continue
        peaks = own["peak_bytes_median"].fillna(own["peak_bytes_predicted"]).astype(float)
        if own[f"{SECONDS}_median"].isna().all() and peaks.isna().all():  # no step was measured
            continue
        least = own.assign(peak=peaks)[peaks <= SAME_MEMORY * peaks.min()].sort_values("peak")
        rows.append(
            {
                **values,
                "length": values["seq_len"],
                "fastest": _fastest(own),
                "least memory": _named([_lean(row) for _, row in least.iterrows()]),
                "variants": own["label"].nunique(),
            }
        )
    return _most(rows, NAMED)


def _fastest(own: pd.DataFrame) -> str:
    """The variants of a group and length that none is known to be faster than; a sentence where that is all
    of them or nobody knows."""
    timed = own[own[f"{SECONDS}_median"].notna()].sort_values(f"{SECONDS}_median")
    sound = timed[~timed[DISTURBED]]
    if timed.empty:
        return ""
    if sound.empty:
        return ONLY_DISTURBED
    if len(sound) == 1 < len(timed):
        return f"{UNDECIDED}: one undisturbed time"
    beaten = {place for slower in faster_than(sound) for place in slower}
    names = [_quick(row) for place, (_, row) in enumerate(sound.iterrows()) if place not in beaten]
    out = f"; {len(timed) - len(sound)} left out{CONTAMINATED}" if len(sound) < len(timed) else ""
    return (UNDECIDED if len(names) == len(sound) > 1 else _named(names)) + out


def _quick(row: pd.Series[Any]) -> str:
    ratio = row[f"{SECONDS}_ratio"]
    return str(row["label"]) + ("" if pd.isna(ratio) else f" ({units.ratio(ratio)}{against(row)})")


def _lean(row: pd.Series[Any]) -> str:
    ratio, mark = row["peak_bytes_ratio"], PREDICTED if peak(row).endswith(PREDICTED) else ""
    return f"{row['label']}{mark}" + ("" if pd.isna(ratio) else f" ({units.ratio(ratio)})")


def _models(cells: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for values, own in split(cells, BUDGET) if len(cells) else ():
        own = own[~own["is_other_rate"]]
        if own["label"].nunique() < 2:
            continue
        keys = [key for key in TRAINING if key != "learning_rate" and not pd.isna(values[key])]
        accurate = bool(own["accuracy_mean"].notna().any())
        rows.append(
            {
                **values,
                "length": values["seq_len"],
                "trained": ", ".join(training(values, keys)),
                **(_most_accurate(own) if accurate else _ranked(own)),
                "3-gram": units.score(own["ngram_3_bits_per_byte"].mean()),
                "guessing": units.share(own["guess_accuracy"].median()),
                "variants": own["label"].nunique(),
            }
        )
    return _most(rows, [key for key in NAMED if key != "batch_size"])


def _ranked(own: pd.DataFrame) -> dict[str, str]:
    """The models that may be the first of their pool, and the score of the one with the least loss."""
    ranked = own[own["rank_low"].notna()]
    best = ranked[ranked["rank_low"] == 1].sort_values("nll_mean")
    if best.empty:
        return {"best": _why_not(own), "score": _range(own)}
    return _best(best, len(ranked), _score(best.iloc[0]), _range(ranked))


def _most_accurate(own: pd.DataFrame) -> dict[str, str]:
    """The models whose intervals of the accuracy reach that of the highest; one replicate has none, and
    reaches all."""
    own = own[own["accuracy_mean"].notna() & ~own["leaks"].eq(True)]
    if own.empty:
        return {"best": "not ranked: all see the future", "score": ""}
    own = own.sort_values("accuracy_mean", ascending=False, kind="stable")
    mean, deviation = (own[f"accuracy_{name}"].to_numpy(dtype=float) for name in ("mean", "std"))
    low, high = of_share(mean, deviation, own["quality_replicates"])
    first = own.iloc[0]
    score = units.share(first["accuracy_mean"], first["accuracy_std"])
    return _best(own[~(high < low[0])], len(own), f"accuracy {score}", _range(own))


def _best(best: pd.DataFrame, of: int, score: str, scores: str) -> dict[str, str]:
    if len(best) == of > 1:
        return {"best": UNDECIDED, "score": scores}
    return {"best": _named([str(label) for label in best["label"]]), "score": score}


def _why_not(own: pd.DataFrame) -> str:
    """Why no model of a pool has a rank."""
    reasons = {
        "leaks": "all see the future",
        "undertrained": "undertrained",
        "no_baseline": "no baseline",
    }
    if own["unsettled"].eq(True).any():
        return "not ranked (see Before ranking)"
    why = [words for key, words in reasons.items() if own[key].eq(True).all()]
    return f"not ranked: {why[0] if why else 'too many models, and none is dense'}"


def _named(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:MOST_NAMES])} and {more} more"


def _score(row: pd.Series[Any]) -> str:
    if not pd.isna(row["bits_per_byte_mean"]):
        return f"{plus_minus(row['bits_per_byte_mean'], row['bits_per_byte_std'])} bits per byte"
    return f"perplexity {plus_minus(row['perplexity_mean'], row['perplexity_std'])}"


def _range(cells: pd.DataFrame) -> str:
    """From the lowest to the highest score of models that are not told apart, or not ranked."""
    for key, words, show in (
        ("accuracy_mean", "accuracy {} to {}", units.share),
        ("bits_per_byte_mean", "{} to {} bits per byte", units.score),
        ("perplexity_mean", "perplexity {} to {}", units.score),
    ):
        if cells[key].notna().any():
            return words.format(show(cells[key].min()), show(cells[key].max()))
    return units.MISSING


def _most(rows: list[dict[str, Any]], named: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the settings with the most variants, in their order, with their `setting` in words: it has
    every key in which the rows differ."""
    largest = sorted(rows, key=lambda row: -int(row["variants"]))[:MOST_ROWS]
    kept = [row for row in rows if row in largest]
    if not kept:
        return []
    apart = varying(pd.DataFrame(kept), SETTING)
    shown = [key for key in SETTING if key in named or key in apart]
    return [{**row, "setting": describe(row, shown)} for row in kept]


def _table(heading: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Table]:
    if not rows:
        return []
    settings = {row["setting"] for row in rows}
    columns = [] if len(settings) == 1 else [Column("setting", [row["setting"] for row in rows], right=False)]
    columns += [Column(key, [str(row[key]) for row in rows], optional=False) for key in ("length", "depth")]
    columns += [Column(name, [or_dash(row[name] or None) for row in rows], right=False) for name in names]
    return [Table(columns, heading, setting=settings.pop() if len(settings) == 1 else "")]


SECTIONS: Sequence[Section[Any]] = (Answer(),)
