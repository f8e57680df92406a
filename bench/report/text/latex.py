"""LaTeX that survives its contents: escaped cells, booktabs tables for \\input into a paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

from bench.inputs.printable import printable
from bench.report.text.columns import Column, shown
from bench.report.text.escape import latex

_SIGNS = {
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "√": r"$\surd$",
    "²": r"$^2$",
    "·": r"$\cdot$",
    "µ": r"\textmu{}",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "§": r"\S{}",
    "ʳ": r"\textsuperscript{r}",
    "ᵘ": r"\textsuperscript{u}",
    "ⁿ": r"\textsuperscript{n}",
    "ᶜ": r"\textsuperscript{c}",
    "ᵍ": r"\textsuperscript{g}",
    "ᵖ": r"\textsuperscript{p}",
    "…": r"\ldots{}",
}
"""Signs and marks of our tables that LaTeX's default fonts lack, or have elsewhere."""
_GLYPHS = re.compile(r"[ -~\u00a1-\u017f]")


def escape(text: object) -> str:
    """Text on one line without active markup; a character that pdfLaTeX has no glyph for becomes its code."""
    return "".join(_character(c) for c in printable(text))


@cache
def _character(c: str) -> str:
    return _SIGNS.get(c) or (c if c == " " else latex(c) if _GLYPHS.match(c) else f"{{[}}U+{ord(c):04X}{{]}}")


def table(columns: Sequence[Column], *, caption: str, label: str, notes: Mapping[str, str]) -> str:
    """A floating table as wide as the text; the marks in its cells are explained beneath.

    All cells, titles, caption and notes are escaped. Needs the packages booktabs and graphicx.
    """
    shown_columns = shown(columns)
    rows = [[escape(text) for text in row] for row in zip(*(c.cells for c in shown_columns), strict=True)]
    used = {
        mark: meaning
        for mark, meaning in notes.items()
        if any(mark in t for c in shown_columns for t in c.cells)
    }
    beneath = [rf"{escape(mark)} {escape(meaning)}.\par" for mark, meaning in used.items()]
    lines = [
        r"\begin{table}[p]",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{{label}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{@{{}}{''.join('r' if c.right else 'l' for c in shown_columns)}@{{}}}}",
        r"\toprule",
        _row([escape(c.title) for c in shown_columns]),
        r"\midrule",
        *(_row(row) for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        *([r"\par\smallskip\raggedright\footnotesize", *beneath] if beneath else []),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
