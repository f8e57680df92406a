"""Markdown that survives its contents: escaped cells, aligned columns, relative images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bench.inputs.printable import printable
from bench.report.text.columns import Column, shown
from bench.report.text.tables import Table

REASON_LIMIT = 400


def escape(text: object) -> str:
    """Text on one line without active markup: pipes, stars, tags, code, formulas and underscores are
    escaped."""
    line = re.sub(r"([\\|*`<\[\]&~$]|^[#>])", r"\\\1", printable(text))
    # Underscores are markup only at the edge of a word; within one they stay readable.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)


def plain(text: str) -> str:
    """A lead or a note of Markdown without the marks of emphasis and code, for the page."""
    return re.sub(r"[*`]", "", text)


def shortened(text: str) -> str:
    """At most REASON_LIMIT characters; the whole text is in cells.parquet."""
    return printable(text, REASON_LIMIT)


def table(columns: Sequence[Column]) -> str:
    """A pipe table; optional columns that hold only dashes are left out.

    All titles and cells are escaped. Ends with a newline.
    """
    shown_columns = shown(columns)
    texts = [[escape(text) for text in (c.title, *c.cells)] for c in shown_columns]
    widths = [max(3, *(len(text) for text in column)) for column in texts]
    rules = ["-" * (w - 1) + ":" if c.right else "-" * w for c, w in zip(shown_columns, widths, strict=True)]
    title, *lines = [_row(texts_of_row, widths, shown_columns) for texts_of_row in zip(*texts, strict=True)]
    return "\n".join([title, "| " + " | ".join(rules) + " |", *lines]) + "\n"


def _row(cells: Sequence[str], widths: Sequence[int], columns: Sequence[Column]) -> str:
    padded = [
        cell.rjust(width) if column.right else cell.ljust(width)
        for cell, width, column in zip(cells, widths, columns, strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def section(title: str, body: str, notes: Mapping[str, str], lead: str = "") -> str:
    """A section, with the marks in its body explained beneath; empty for an empty body.

    `notes` maps marks to their meanings.
    """
    if not body:
        return ""
    used = [f"- {mark} {meaning}." for mark, meaning in notes.items() if mark in body]
    parts = [f"## {title}\n", lead and lead + "\n", body, *used]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def folded(title: str, body: str) -> str:
    """A part that a reader opens; renderers that cannot fold show it open."""
    return f"<details><summary>{escape(title)}</summary>\n\n{body}\n</details>\n"


def image(title: str, path: str) -> str:
    """A picture by its relative path, with a link to its SVG version."""
    return f"[![{escape(title)}]({path}.png)]({path}.svg)\n"


def block(of: Table) -> str:
    """A table under its heading, with its lead, its setting and its note."""
    words = [text for text in (of.lead, escape(of.setting)) if text]
    note = f"\n{escape(of.note)}\n" if of.note else ""
    body = "\n\n".join([*words, table(of.columns) + note])
    if of.folded:
        return folded(of.heading, body)
    return f"### {escape(of.heading)}\n\n{body}" if of.heading else body
