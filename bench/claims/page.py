"""The table of claims, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from bench.claims.base import Claim, Finding, claims, judged
from bench.report.text import markdown
from bench.report.text.columns import Column
from bench.report.text.markdown import escape

MEANINGS = {
    "holds": "the cells show what is said, within the spread of their replicates",
    "holds with a condition": "they show it where the condition is met, or with another constant; the "
    "condition follows the verdict",
    "does not hold here": "they show something else, on this machine and at these sizes",
    "not measured": "the cells that would say are missing or did not finish; why follows the verdict",
}
"""What each verdict means."""


@dataclass(frozen=True)
class Row:
    """One claim and what became of it."""

    number: int
    claim: Claim
    finding: Finding

    @property
    def verdict(self) -> str:
        """The verdict with what it is subject to."""
        condition = self.finding.condition
        return self.finding.verdict + (f": {condition}" if condition else "")


def page(name: str, frame: pd.DataFrame) -> str:
    """`claims.md` of an experiment."""
    rows = [Row(number, claim, judged(claim, frame)) for number, claim in claims()]
    return "\n".join([f"# Claims: {escape(name)}\n", _lead(rows, frame), _table(rows)])


def _table(rows: Sequence[Row]) -> str:
    return markdown.table(
        [
            Column("no.", [str(row.number) for row in rows], optional=False),
            _texts("claim", [row.claim.STATEMENT for row in rows]),
            _texts("said by", [row.claim.SOURCE for row in rows]),
            _texts("arithmetic predicts", [row.finding.predicted for row in rows]),
            _texts("measured here", [row.finding.measured for row in rows]),
            Column("verdict", [row.verdict for row in rows], right=False, optional=False),
        ]
    )


def _texts(title: str, cells: Sequence[str]) -> Column:
    return Column(title, list(cells), right=False, optional=False)


def _lead(rows: Sequence[Row], frame: pd.DataFrame) -> str:
    """What was measured where and when, and what a verdict means."""
    counts = {verdict: sum(row.finding.verdict == verdict for row in rows) for verdict in MEANINGS}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines = [
        f"{len(rows)} statements about long-context attention, each held against records: {said}. All of it "
        "is made from the records and from formulas over their sizes.\n",
        *(f"- {fact}" for fact in _facts(frame)),
        "- An interval is one of 95 % over replicates, of two replicates their range; ratios are taken "
        "within a replicate. FLOPs and memory hardly vary and stand without.",
        *(f"- *{verdict}*: {MEANINGS[verdict]}." for verdict, count in counts.items() if count),
    ]
    return "\n".join(lines) + "\n"


def _facts(frame: pd.DataFrame) -> list[str]:
    """Machine, date, cells and replicates."""
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
        facts.append(f"Contaminated: {spoilt} cells, timed while something else ran; their times take part.")
    return facts
