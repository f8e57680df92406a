"""The page of claims, as Markdown: a table of verdicts, then the parts of each claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from bench.claims.base import Claim, Finding, Verdict, claims, judge
from bench.records import Record
from bench.report.text import markdown
from bench.report.text.columns import Column
from bench.report.text.markdown import escape

MEANINGS: dict[Verdict, str] = {
    "shown": "the cells confirm it: the whole interval over replicates, or a figure that does not vary",
    "contradicted": "the cells contradict it, on this machine and at these sizes",
    "not decided here": "cells are missing, or the interval contains the limit; the reason follows",
}
"""The meaning of each verdict of a part."""


@dataclass(frozen=True)
class Row:
    """One claim and its finding."""

    number: int
    claim: Claim
    finding: Finding


def page(name: str, frame: pd.DataFrame) -> str:
    """Return the text of `claims.md` of an experiment.

    The claims are about stacks of blocks with an MLP, so cells of other models are left out.
    """
    frame = frame[(frame["feed_forward"] == Record.feed_forward) & (frame["stack"] == Record.stack)]
    rows = [Row(number, claim, judge(claim, frame)) for number, claim in claims()]
    parts = [f"# Claims: {escape(name)}\n", _lead(rows, frame), _table(rows), *map(_details, rows)]
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    return markdown.table(
        [
            Column("no.", [str(row.number) for row in rows], optional=False),
            _texts("claim", [row.claim.STATEMENT for row in rows]),
            _texts("verdict", [row.finding.verdict for row in rows]),
            _texts("parts", [_counts(row.finding) for row in rows]),
        ]
    )


def _counts(finding: Finding) -> str:
    """Return how many parts have each verdict: '2 shown, 1 contradicted'."""
    verdicts = [part.verdict for part in finding.parts.values()]
    counts = {verdict: verdicts.count(verdict) for verdict in MEANINGS}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _details(row: Row) -> str:
    """Return the section of a claim: its source, and its parts with their judgements."""
    lines = [f"## {row.number}. {escape(row.claim.STATEMENT)}\n", f"Source: {escape(row.claim.SOURCE)}.\n"]
    for says, part in row.finding.parts.items():
        reason = f": {part.reason}" if part.reason and part.verdict != "shown" else ""
        lines.append(f"- {escape(says)}. **{part.verdict}**{escape(reason)}")
        texts = {"predicted": part.predicted, "measured": part.measured}
        lines += [f"  - {name}: {escape(text)}" for name, text in texts.items() if text]
    return "\n".join(lines) + "\n"


def _texts(title: str, cells: Sequence[str]) -> Column:
    return Column(title, list(cells), right=False, optional=False)


def _lead(rows: Sequence[Row], frame: pd.DataFrame) -> str:
    """Return the introduction: where and when the cells were measured, and the meaning of the verdicts."""
    counts = {verdict: sum(row.finding.verdict == verdict for row in rows) for verdict in MEANINGS}
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines = [
        f"{len(rows)} claims about long-context attention, each checked against records: {verdicts}. The "
        "whole page is generated from the records and from formulas over their sizes.\n",
        *(f"- {fact}" for fact in _facts(frame)),
        "- Intervals are 95 % intervals over replicates; ratios are taken within a replicate. FLOPs and "
        "memory hardly vary and have no interval. Fewer than three replicates decide nothing.",
        *(f"- *{verdict}*: {meaning}." for verdict, meaning in MEANINGS.items()),
        "- A claim is contradicted if one of its parts is, and shown if all are.",
    ]
    return "\n".join(lines) + "\n"


def _facts(frame: pd.DataFrame) -> list[str]:
    """Return the machine, date, cells and replicates."""
    run = frame[frame["peak_bytes_source"] != "predicted"]
    ran = run[run["status"] == "ok"]
    times = sorted(str(time) for time in frame["started_at"].dropna())
    machines = frame.groupby(["machine", "threads"], sort=True).size()
    where = "; ".join(
        f"{machine}, {threads} thread{'s' * (threads != '1')}" for machine, threads in machines.index
    )
    unfinished = frame["status"].ne("ok").sum()
    spoilt = ran["contaminated"].notna().sum()
    facts = [
        f"Machine: {escape(where)}.",
        f"Cells: {len(frame)}, of which {len(ran)} were run and finished, in up to "
        f"{ran['replicate'].nunique()} replicates, and {len(frame) - len(run)} were predicted or not run; "
        f"{unfinished} did not finish.",
    ]
    if times:
        facts.insert(0, f"Date: {' to '.join(dict.fromkeys([times[0][:10], times[-1][:10]]))}.")
    if spoilt:
        facts.append(f"Contaminated: {spoilt} cells, by other load; their times are included.")
    return facts
