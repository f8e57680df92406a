"""The table of claims, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from bench.claims.base import Claim, Finding, claims, judged
from bench.records import Record
from bench.report.text import markdown
from bench.report.text.columns import Column
from bench.report.text.markdown import escape

MEANINGS = {
    "holds": "the cells confirm the claim, within the spread of their replicates",
    "holds with a condition": "the cells confirm the claim under a condition or with another constant; the "
    "condition follows the verdict",
    "does not hold here": "the cells contradict the claim, on this machine and at these sizes",
    "not measured": "the required cells are missing or did not finish; the reason follows the verdict",
}
"""The meaning of each verdict."""


@dataclass(frozen=True)
class Row:
    """One claim and its finding."""

    number: int
    claim: Claim
    finding: Finding

    @property
    def verdict(self) -> str:
        """The verdict with its condition."""
        condition = self.finding.condition
        return self.finding.verdict + (f": {condition}" if condition else "")


def page(name: str, frame: pd.DataFrame) -> str:
    """Return the text of `claims.md` of an experiment.

    The claims are about stacks of blocks with an MLP, so cells of other models are left out.
    """
    frame = frame[(frame["feed_forward"] == Record.feed_forward) & (frame["stack"] == Record.stack)]
    rows = [Row(number, claim, judged(claim, frame)) for number, claim in claims()]
    return "\n".join([f"# Claims: {escape(name)}\n", _lead(rows, frame), _table(rows)])


def _table(rows: Sequence[Row]) -> str:
    return markdown.table(
        [
            Column("no.", [str(row.number) for row in rows], optional=False),
            _texts("claim", [row.claim.STATEMENT for row in rows]),
            _texts("source", [row.claim.SOURCE for row in rows]),
            _texts("predicted by arithmetic", [row.finding.predicted for row in rows]),
            _texts("measured here", [row.finding.measured for row in rows]),
            Column("verdict", [row.verdict for row in rows], right=False, optional=False),
        ]
    )


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
        "- Intervals are 95 % intervals over replicates, or the range for two replicates; ratios are taken "
        "within a replicate. FLOPs and memory hardly vary and have no interval.",
        *(f"- *{verdict}*: {MEANINGS[verdict]}." for verdict, count in counts.items() if count),
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
