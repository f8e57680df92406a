"""Claims with several parts: each part is judged separately, and the verdict combines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench.claims.base import Finding, Missing, Verdict
from bench.claims.cells import Spread
from bench.report.data.groups import SLOT_COLUMNS
from bench.report.data.power_law import Fit, fit

ALIKE = (
    *("seq_len", "depth", "d_model", *SLOT_COLUMNS.values(), "objective", "batch_size"),
    *("tokens_trained", "learning_rate"),
)
"""The keys that must be equal for the quality of two trained models to be compared."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a claim."""

    predicted: str
    measured: str
    verdict: Verdict
    but: str = ""
    """The condition under which the part holds, or the result that the cells show instead; required unless it
    holds."""

    def __post_init__(self) -> None:
        """Raises ValueError if the verdict requires `but` and it is empty."""
        if self.verdict != "holds" and not self.but.strip():
            raise ValueError(f"verdict {self.verdict!r}: needs the result that the cells show instead")


def together(parts: Sequence[Part]) -> Finding:
    """Combine parts. The claim holds if every part holds, and does not hold if no part holds. Otherwise it
    holds with a condition, which lists the parts that do not simply hold; a part that does not hold at all is
    marked 'not here'."""
    verdicts = {part.verdict for part in parts}
    marks = {"does not hold here": "not here: "} if len(verdicts) > 1 else {}
    return Finding(
        predicted="\n".join(part.predicted for part in parts if part.predicted),
        measured="\n".join(part.measured for part in parts),
        verdict=verdicts.pop() if len(verdicts) == 1 else "holds with a condition",
        condition="; ".join(
            marks.get(part.verdict, "") + part.but for part in parts if part.verdict != "holds"
        ),
    )


def beyond(spread: Spread, threshold: float = 0.0) -> Verdict:
    """Judge whether a figure is above a threshold: it holds if its whole interval is above, and does not hold
    if its median is not. Otherwise, and for a single replicate, it holds with a condition: that the result is
    not due to chance."""
    if spread.middle <= threshold:
        return "does not hold here"
    return "holds" if spread.count > 1 and spread.low > threshold else "holds with a condition"


def unsure(spread: Spread) -> str:
    """Return why a figure is not conclusive although its median supports the claim; follows 'but'."""
    return (
        "not beyond the spread of the replicates"
        if spread.count > 1
        else "a single replicate is not conclusive"
    )


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
        raise Missing(f"variant={variant} measure=plan: needs {name} at more than {len(each)} lengths")
    return law, [int(size) for size in each.index if law.first <= size <= law.last]


def reaches(
    rows: pd.DataFrame, knobs: Sequence[str], adds: Callable[[Mapping[str, int]], int], formula: str
) -> Part:
    """Judge whether each layer extends the reach by a formula of the knobs, at every depth.

    The last token reaches back to the start of its segment, plus the extension by each layer. Cells whose
    reach is limited by the sequence are excluded. Raises Missing if fewer than two depths remain.
    """
    free = rows[rows["reach"] < rows["seq_len"] - 1]
    if free["depth"].nunique() < 2:
        raise Missing(f"variant={rows.iloc[0]['variant']}: needs a reach within the sequence at two depths")
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
    return Part(
        predicted=f"The last token reaches back (its position in its segment) + depth × {formula} tokens.",
        measured=f"Reach by the layers' masks; {'; '.join(lines)}.",
        verdict="holds" if right else "does not hold here",
        but="the reach differs from the formula",
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)
