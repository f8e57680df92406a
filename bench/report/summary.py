"""summary.md and summary.tex: the head, the answer, then every section's figures and tables with its marks
explained. In summary.md, what comes after the answer is folded.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.inputs.errors import ConfigError, choose
from bench.records import STATUSES
from bench.records.configurations import UNKNOWN
from bench.records.record import SLOTS
from bench.report import ReportError
from bench.report.data.collect import Collected
from bench.report.figures.drawing import Plots
from bench.report.figures.spec import Drawn
from bench.report.sections import Results, Section
from bench.report.text import latex, markdown
from bench.report.text.machines import dates, machines, settings
from bench.report.text.markdown import escape
from bench.report.text.marks import SHORT_NOTES
from bench.report.text.tables import Table

MOST_FRONT = 6
"""Figures before the fold of sections that are behind it."""
REST = "All tables and figures"


def text(results: Results, plots: Plots, notes: Sequence[str] = ()) -> str:
    """The whole of summary.md; `notes` are more lines of its head."""
    tables = results.tables
    leading = [section.name for section in results.sections if section.front and tables[section.name]]
    shown = _front_plots(plots, leading)
    answer = [
        _section(section, tables[section.name], shown.get(section.name, []))
        for section in results.sections
        if section.front
    ]
    placed = [one for drawn in shown.values() for one in drawn]
    others = [
        _section(
            section,
            tables[section.name],
            [one for one in plots.get(section.name, ()) if one not in placed],
        )
        for section in results.sections
        if not section.front
    ]
    rest = "\n".join(part for part in others if part)
    if any(answer) and rest:
        rest = markdown.folded(REST, rest)
    return "\n".join(part for part in (_head(results, notes), *answer, rest) if part)


def _front_plots(plots: Plots, leading: Sequence[str]) -> dict[str, list[Drawn]]:
    """The figures before the fold, by the section that shows them: each of the `leading` ones its own, the
    first of them also those of all others."""
    front = {name: [one for one in drawn if one.front and not one.linked] for name, drawn in plots.items()}
    shown = {name: front.pop(name, []) for name in leading}
    if leading:
        shown[leading[0]] += [one for drawn in front.values() for one in drawn][:MOST_FRONT]
    return shown


def _section(section: Section[Any], tables: Sequence[Table], plots: Sequence[Drawn]) -> str:
    """A section with the marks that it uses explained beneath; empty for one without table and figure."""
    figures = [markdown.image(one.title, one.path) for one in plots if not one.linked]
    for words in dict.fromkeys(one.linked for one in plots if one.linked):
        links = (f"[{escape(one.title)}]({one.path}.png)" for one in plots if one.linked == words)
        figures.append(f"{words}: {', '.join(links)}.\n")
    ordered = sorted(tables, key=lambda table: table.folded)
    if not ordered and not section.figures_alone:
        return ""
    blocks = [markdown.block(table) for table in ordered]
    body = [*figures, *blocks] if section.figures_first else [*blocks, *figures]
    return markdown.section(section.title, "\n".join(body), section.marks, section.lead)


def tex(results: Results, chosen: Sequence[str] | None = None) -> str:
    """The whole of summary.tex, to be read by \\input: a floating table for each table that has a caption.

    `chosen` are titles of columns of figures. Columns of text name the rows and are always there; a table
    with none of the chosen columns is left out. Raises ReportError for a title that no table has.
    """
    frame = results.records.collected.frame
    when = dates(frame)
    names = ", ".join(sorted(frame["name"].unique()))
    head = (
        f"% {' '.join(names.split())}: {' '.join(machines(frame).split())}; {when}\n"
        "% \\usepackage{booktabs,graphicx}, then \\input this file.\n"
    )
    captioned = [
        (name, number, table)
        for name, tables in results.tables.items()
        for number, table in enumerate((table for table in tables if table.caption), 1)
    ]
    titles = {column.title for *_, table in captioned for column in table.columns if column.right}
    for title in chosen or ():
        try:
            choose("column", title, sorted(titles))
        except ConfigError as error:
            raise ReportError(str(error)) from None
    parts = [
        latex.table(
            [c for c in table.columns if chosen is None or not c.right or c.title in chosen],
            caption=f"{table.caption}, {when}.",
            label=f"tab:{name}-{number}",
            notes=SHORT_NOTES,
        )
        for name, number, table in captioned
        if chosen is None or any(c.right and c.title in chosen for c in table.columns)
    ]
    return "\n".join([head, *parts])


def facts(results: Results) -> dict[str, str]:
    """The lines of the head, by name: machine, dates, versions, counts, and the sections' facts."""
    frame, every = results.records.collected.frame, results.records.collected.every
    counts = every["status"].value_counts()
    statuses = ", ".join(f"{counts[s]} {s}" for s in STATUSES if s in counts)
    replicates = frame["replicate"].nunique()
    result = {
        "machine": machines(frame),
        "dates": dates(frame),
        "torch": ", ".join(sorted(frame["torch_version"].dropna().unique())) or UNKNOWN,
        "records": f"{len(every)}, of {replicates} replicate{'s' if replicates > 1 else ''}"
        + (f"; {again} are second measurements of the same" if (again := len(every) - len(frame)) else ""),
        "statuses": statuses,
    }
    if dirty := int(every["git_dirty"].eq(True).sum()):
        result["uncommitted changes"] = f"in the code of {dirty} of {len(every)} records"
    if words := settings(frame):
        result["settings"] = words
    for section, data in results:
        result.update(section.facts(data))
    return result


def _head(results: Results, notes: Sequence[str]) -> str:
    collected = results.records.collected
    names = ", ".join(sorted(collected.frame["name"].unique()))
    lines = [
        f"# {escape(names)}\n",
        *(f"- {key}: {escape(value)}" for key, value in facts(results).items()),
    ]
    lines += [f"- **{escape(warning)}**" for warning in (*notes, *warnings(results))]
    lines += [f"  - {escape(problem)}" for problem in collected.problems]
    return "\n".join(lines) + "\n"


def warnings(results: Results) -> list[str]:
    """Warnings about comparisons, for the head; unread files come last."""
    collected = results.records.collected
    frame, lines = collected.frame, []
    # mixtures with other members run other modules, and so do other entries of the slots
    members = frame["params_json"].map(lambda text: json.dumps(json.loads(text).get("layers")))
    versions = frame.groupby(["variant", members, *SLOTS])["code_sha256"].transform("nunique")
    if names := sorted(frame["variant"][versions > 1].unique()):
        lines.append(f"measured by several versions of the code: {', '.join(names)}")
    if collected.stale:
        lines.append(_stale(collected))
    if ahead := sum(record.in_future(time.time()) for record in collected.records):
        lines.append(
            f"{ahead} records are dated in the future: a clock ran ahead as they were measured; "
            "python -m bench.records check lists them"
        )
    if collected.alike:
        one = collected.alike == 1
        lines.append(
            f"{collected.alike} record{' shares' if one else 's share'} every key and the replicate with "
            "another: they differ in a setting that a record does not name, and are aggregated together"
        )
    for section, data in results:
        lines += section.warnings(data)
    if collected.problems:
        lines.append(f"{len(collected.problems)} files that cannot be read were left out:")
    return lines


def _stale(collected: Collected) -> str:
    """How many records were left out, and why."""
    counts = Counter(" ".join(why.split()[:3]) for why in collected.stale.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return (
        f"{len(collected.stale)} older records left out ({reasons} of before): their configurations were "
        "measured again since; python -m bench.records check lists them"
    )
