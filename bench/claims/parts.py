"""A claim that says several things at once: each is judged, and the verdict is of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench.claims.base import Finding, Missing, Verdict
from bench.claims.cells import Spread
from bench.report.data.power_law import Fit, fit

ALIKE = ("seq_len", "depth", "d_model", "objective", "batch_size", "tokens_trained", "learning_rate")
"""What two trained models must share for their quality to be compared."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the things said."""

    predicted: str
    measured: str
    verdict: Verdict
    but: str = ""
    """Under which condition it holds, or what is so instead; needed unless it holds."""

    def __post_init__(self) -> None:
        """Raises ValueError where a part that does not simply hold leaves open what is so."""
        if self.verdict != "holds" and not self.but.strip():
            raise ValueError(f"verdict {self.verdict!r}: needs what is so instead")


def together(parts: Sequence[Part]) -> Finding:
    """It holds where every part does, and does not where none does; else it holds with a condition, which
    says what becomes of the parts that do not simply hold: 'not here' where one does not at all."""
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


def beyond(found: Spread, threshold: float = 0.0) -> Verdict:
    """Whether a figure is above a threshold: it holds where its interval is, and does not where its middle
    is not. Between the two, as of a single replicate, it holds on the condition that this is no accident."""
    if found.middle <= threshold:
        return "does not hold here"
    return "holds" if found.count > 1 and found.low > threshold else "holds with a condition"


def unsure(found: Spread) -> str:
    """Why a figure decides nothing though its middle is on the right side: to follow 'but'."""
    return "not beyond the spread of the replicates" if found.count > 1 else "one replicate says no more"


def one_setting(rows: pd.DataFrame) -> pd.DataFrame:
    """Those rows that share `ALIKE`: of several settings, the one with the most replicates, then the one with
    the most training, then the longest."""
    groups = (group for _, group in rows.groupby([*ALIKE], dropna=False))
    return max(
        groups, key=lambda own: (own["replicate"].nunique(), *own.iloc[0][["tokens_trained", "seq_len"]])
    )


def like(rows: pd.DataFrame) -> dict[str, Any]:
    """The values of `ALIKE`, in plain types, of rows that share them."""
    values = {key: rows.iloc[0][key] for key in ALIKE}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}


def knob(rows: pd.DataFrame, name: str) -> pd.Series[int]:
    """A knob of each row's variant, a whole number."""
    return rows["variant_params"].map(lambda params: int(params[name]))


def points(value: float) -> str:
    """A difference in nats a token: '+0.0123'."""
    return f"{value:+.4f}"


def share(value: float) -> str:
    """'28 %'; '2.8 %' below ten."""
    return f"{100 * value:.{0 if abs(value) >= 0.0995 else 1}f} %"


def exponent(rows: pd.DataFrame, name: str) -> tuple[Fit, list[int]]:
    """With which power of the length a figure of planned cells grows, and the lengths that were fitted.

    Of several settings, the one that reaches furthest over the most lengths. Raises Missing where there are
    too few.
    """
    planned = rows[(rows["flops_source"] == "predicted") & rows[name].notna()]
    groups = planned.groupby(["params_json", "depth", "d_model", "heads", "batch_size", "objective"])
    lengths = [group.groupby("seq_len")[name].median() for _, group in groups]
    each = max(lengths, key=lambda own: (len(own), own.index.max()), default=pd.Series(dtype=float))
    found = fit(list(each.index), list(each))
    if found is None:
        variant = rows.iloc[0]["variant"]
        raise Missing(f"variant={variant} measure=plan: needs {name} at more than {len(each)} lengths")
    return found, [int(size) for size in each.index if found.first <= size <= found.last]


def reaches(
    rows: pd.DataFrame, knobs: Sequence[str], adds: Callable[[Mapping[str, int]], int], formula: str
) -> Part:
    """Whether each layer adds to the reach what a formula of the knobs says, at every depth.

    The last token reaches back to the start of its segment, and from there what the layers add. A reach that
    the sequence cuts short says nothing and is left out. Raises Missing where fewer than two depths are left.
    """
    free = rows[rows["reach"] < rows["seq_len"] - 1]
    if free["depth"].nunique() < 2:
        raise Missing(f"variant={rows.iloc[0]['variant']}: needs a reach within the sequence at two depths")
    right, lines = True, []
    for _, same in free.sort_values("depth").groupby("params_json"):
        own = {name: int(same.iloc[0]["variant_params"][name]) for name in knobs}
        by_depth = same.drop_duplicates("depth")
        depths = [int(depth) for depth in by_depth["depth"]]
        found = [int(reach) for reach in by_depth["reach"]]
        starts = [int(length - 1) % own["segment"] for length in by_depth["seq_len"]]
        wanted = [start + depth * adds(own) for start, depth in zip(starts, depths, strict=True)]
        right &= found == wanted
        words = ", ".join(f"{name} {value}" for name, value in own.items())
        instead = "" if found == wanted else f" (by the formula {_listed(wanted)})"
        lines.append(f"{words}: {_listed(found)} tokens at depth {_listed(depths)}{instead}")
    return Part(
        predicted=f"The last token reaches its place in its segment + depth × {formula} tokens back.",
        measured=f"Reach by the layers' patterns; {'; '.join(lines)}.",
        verdict="holds" if right else "does not hold here",
        but="the reach is not what the formula says",
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)
