"""The marks of the report's tables, and the cells of tables that carry them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import DISTURBED, RATIO_DISTURBED
from bench.report.data.statistics import DRIFT_LIMIT, LEAK_LIMIT
from bench.report.text import units

LEAK, DRIFT, PREDICTED, UNDERTRAINED = "†", "‡", "ᵖ", "ᵘ"
ALIKE, UNTOLD, OF_TWO, CONTAMINATED = "≈", "?", "ʳ", "§"
LAUNCH_BOUND, MATH, SHORT, NO_BASELINE = "ʰ", "ᵐ", "ˢ", "ⁿ"
BY_CHANCE, GUESSES = "ᶜ", "ᵍ"
OF_INTERVALS = {
    ALIKE: "not called different from dense: an end of the ratio's interval lies within the noise floor (its "
    "upper bound; of n replicates, three or more: over √n), or the difference does not pass Holm's "
    "correction over all ratios in the report",
    UNTOLD: "nothing says whether it differs from dense: it has one replicate, or two and no noise floor",
    OF_TWO: "the range of two replicates, which covers less than a 95 % interval",
    CONTAMINATED: "timed while something else ran (see *Contaminated*), and there is no undisturbed "
    "measurement; of a ratio, this holds for either side",
}
NOTES = {
    LEAK: f"the gate measured a leak of more than {LEAK_LIMIT:g}: with a causal objective it sees the "
    "future, so its perplexity is not ranked and stands after the leak-free ones",
    UNDERTRAINED: "undertrained: it needs more bits per byte than a 3-gram table that learnt the same bytes, "
    "so it is not ranked: such an order says who learns local statistics faster, not who uses a long context",
    NO_BASELINE: "no baseline: the bytes of its token ids are not known (data.tokenizer), so nothing says "
    "whether it is trained, and it is not ranked",
    PREDICTED: "predicted, not measured",
    LAUNCH_BOUND: "launch-bound in one replicate at least: the device was busy for less than 90 % of this "
    "time, which is the time of the host that submits the operations",
    MATH: "torch took the attention backend math, which stores all T × T scores, because no fused one "
    "accepted the tensors",
    SHORT: "sampling ended on its budget in one replicate at least, before the 95 % interval of the median "
    "step was as narrow as measure.precision; fewer than six samples have none",
    DRIFT: f"parameters differ from dense by more than {DRIFT_LIMIT:.0%}: not like for like",
    **OF_INTERVALS,
}
"""Mark → its meaning, for summary.md and the page."""
SHORT_NOTES = {
    LEAK: f"sees the future: the gate measured a leak of more than {LEAK_LIMIT:g}",
    UNDERTRAINED: "undertrained: worse than a 3-gram table that learnt the same bytes; not ranked",
    NO_BASELINE: "no baseline, because the bytes of its token ids are not known; not ranked",
    PREDICTED: NOTES[PREDICTED],
    SHORT: NOTES[SHORT],
    LAUNCH_BOUND: NOTES[LAUNCH_BOUND],
    MATH: NOTES[MATH],
    **OF_INTERVALS,
}
"""Mark → its meaning, for the notes beneath a table of summary.tex."""


def meanings(*marks: str) -> dict[str, str]:
    """Those marks of `NOTES` with their meanings, in the order given."""
    return {mark: NOTES[mark] for mark in marks}


def timed(row: pd.Series[Any], column: str, show: Callable[[Any], str]) -> str:
    """A time or a rate, marked where it is of disturbed measurements."""
    return disturbed(row, column, show, DISTURBED)


def disturbed(row: pd.Series[Any], column: str, show: Callable[[Any], str], flag: str) -> str:
    """A figure, marked where the column `flag` says that it rests on disturbed measurements."""
    return show(row[column]) + (CONTAMINATED if row[flag] and not pd.isna(row[column]) else "")


def sampled(row: pd.Series[Any]) -> str:
    """The half-width of a median's interval within a process, marked where sampling ended on its budget."""
    width = row["half_width"]
    text = units.MISSING if pd.isna(width) else f"± {units.percent(width)}"
    return text + (SHORT if row["sampled_short"] else "")


def interval(rows: Sequence[pd.Series[Any]], name: str, unit: str) -> list[str]:
    """The intervals of a time or a rate over its replicates."""
    texts = [units.between(row[f"{name}_low"], row[f"{name}_high"], unit) for row in rows]
    return marked_range(texts, [row["replicates"] for row in rows], [row[DISTURBED] for row in rows])


def marked_range(texts: Sequence[str], counts: Iterable[int], flags: Iterable[bool]) -> list[str]:
    """Intervals in words, marked where they are the range of two, and where they are of disturbed
    measurements."""
    return [
        text + (OF_TWO if n == 2 else "") + (CONTAMINATED if flag else "") if text != units.MISSING else text
        for text, n, flag in zip(texts, counts, flags, strict=True)
    ]


def against(row: pd.Series[Any]) -> str:
    """The marks of a ratio of times to dense: called different (no mark), not called different, or undecided;
    and whether it rests on disturbed measurements of either."""
    if pd.isna(row[f"{SECONDS}_ratio"]) or row["label"] == row["baseline"]:
        return ""
    mark = UNTOLD if pd.isna(row["differs"]) else "" if row["differs"] else ALIKE
    return mark + (CONTAMINATED if row[RATIO_DISTURBED] else "")
