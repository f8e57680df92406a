"""Verdicts from figures and their intervals, and judgements that several claims share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.claims.base import Judgement, Missing, Verdict
from bench.claims.cells import Spread
from bench.report.data.groups import SLOT_COLUMNS
from bench.report.data.power_law import Fit, fit

ALIKE = (
    *("seq_len", "depth", "d_model", *SLOT_COLUMNS.values(), "objective", "batch_size"),
    *("tokens_trained", "learning_rate"),
)
"""The keys that must be equal for the quality of two trained models to be compared."""
REPLICATES = 3
"""Least number of replicates for a verdict: of two that differ by chance alone, both are above a threshold in
one of four cases."""


def exactly(right: bool) -> Verdict:
    """The verdict of a figure that does not vary between replicates, such as FLOPs."""
    return "shown" if right else "contradicted"


def within(spread: Spread, low: float, high: float) -> Verdict:
    """Judge whether a figure is in a range: shown if its interval is inside, contradicted if it is outside.

    Otherwise, and for fewer than `REPLICATES`, it is not decided.
    """
    if spread.count < REPLICATES:
        return "not decided here"
    if low <= spread.low and spread.high <= high:
        return "shown"
    return "contradicted" if spread.high < low or spread.low > high else "not decided here"


def above(spread: Spread, threshold: float = 0.0) -> Verdict:
    """Judge whether a figure is above a threshold, as `within` does."""
    return within(spread, float(np.nextafter(threshold, np.inf)), np.inf)


def below(spread: Spread, threshold: float) -> Verdict:
    """Judge whether a figure is at most a threshold, as `within` does."""
    return within(spread, -np.inf, threshold)


def every(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of a statement about all of several cases: one contradiction is enough."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "shown" if {*verdicts} == {"shown"} else "not decided here"


def some(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of a statement that one of several cases is so: one that is shown is enough."""
    if "shown" in verdicts:
        return "shown"
    return "contradicted" if {*verdicts} == {"contradicted"} else "not decided here"


def decided_by(spread: Spread) -> str:
    """What would decide about a figure whose interval does not."""
    if spread.count < REPLICATES:
        return f"would need {REPLICATES} replicates or more; there are {spread.count}"
    return "the interval over replicates contains the limit; more replicates or more training would decide"


def reason(verdict: Verdict, instead: str, *spreads: Spread) -> str:
    """The reason of a judgement from intervals: the result instead, or what would decide."""
    if verdict == "shown":
        return ""
    return instead if verdict == "contradicted" else decided_by(min(spreads, key=lambda own: own.count))


def one_setting(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one setting, i.e. with equal `ALIKE` keys: that with the most replicates, then the
    most training, then the longest sequence."""
    groups = (group for _, group in rows.groupby([*ALIKE], dropna=False))
    return max(
        groups, key=lambda own: (own["replicate"].nunique(), *own.iloc[0][["tokens_trained", "seq_len"]])
    )


def like(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the values of the `ALIKE` keys, in plain types, of rows in which they are equal."""
    values = {key: rows.iloc[0][key] for key in ALIKE}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}


def knob(rows: pd.DataFrame, name: str) -> pd.Series[int]:
    """Return an integer knob of each row's variant."""
    return rows["variant_params"].map(lambda params: int(params[name]))


def points(value: float) -> str:
    """Format a difference in nats per token: '+0.0123'."""
    return f"{value:+.4f}"


def share(value: float) -> str:
    """Format a share: '28 %'; '2.8 %' below ten."""
    return f"{100 * value:.{0 if abs(value) >= 0.0995 else 1}f} %"


def exponent(rows: pd.DataFrame, name: str) -> tuple[Fit, list[int]]:
    """Fit the exponent of a figure of planned cells in the length; returns the fit and its lengths.

    Of several settings, the one with the most lengths is used, then that with the longest. Raises Missing if
    there are too few lengths.
    """
    planned = rows[(rows["flops_source"] == "predicted") & rows[name].notna()]
    groups = planned.groupby(
        ["params_json", "depth", "d_model", *SLOT_COLUMNS.values(), "heads", "batch_size", "objective"]
    )
    lengths = [group.groupby("seq_len")[name].median() for _, group in groups]
    each = max(lengths, key=lambda own: (len(own), own.index.max()), default=pd.Series(dtype=float))
    law = fit(list(each.index), list(each))
    if law is None:
        variant = rows.iloc[0]["variant"]
        raise Missing(f"variant={variant} measure=plan: {name} at more than {len(each)} lengths")
    return law, [int(size) for size in each.index if law.first <= size <= law.last]


def reaches(
    rows: pd.DataFrame, knobs: Sequence[str], adds: Callable[[Mapping[str, int]], int], formula: str
) -> Judgement:
    """Judge whether each layer extends the reach by a formula of the knobs, at every depth.

    The last token reaches back to the start of its segment, plus the extension by each layer. Cells whose
    reach is limited by the sequence are excluded. Raises Missing if fewer than two depths remain.
    """
    free = rows[rows["reach"] < rows["seq_len"] - 1]
    if free["depth"].nunique() < 2:
        raise Missing(f"variant={rows.iloc[0]['variant']}: a reach within the sequence at two depths")
    right, lines = True, []
    for _, same in free.sort_values("depth").groupby("params_json"):
        own = {name: int(same.iloc[0]["variant_params"][name]) for name in knobs}
        by_depth = same.drop_duplicates("depth")
        depths = [int(depth) for depth in by_depth["depth"]]
        measured = [int(reach) for reach in by_depth["reach"]]
        starts = [int(length - 1) % own["segment"] for length in by_depth["seq_len"]]
        expected = [start + depth * adds(own) for start, depth in zip(starts, depths, strict=True)]
        right &= measured == expected
        words = ", ".join(f"{name} {value}" for name, value in own.items())
        instead = "" if measured == expected else f" (formula: {_listed(expected)})"
        lines.append(f"{words}: {_listed(measured)} tokens at depth {_listed(depths)}{instead}")
    return Judgement(
        predicted=f"The last token reaches back (its position in its segment) + depth × {formula} tokens.",
        measured=f"Reach by the layers' masks; {'; '.join(lines)}.",
        verdict=exactly(right),
        reason="the reach differs from the formula",
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)
