"""Text from records, escaped so that LaTeX reads no command in it.

Records are data from elsewhere: a name or a reason may hold a tag, a command of TeX or one of a terminal.
Markdown's `escape` is in `markdown`, the terminal's is `bench.inputs.printable`; pages are escaped by Jinja.
"""

from __future__ import annotations

from bench.inputs.printable import printable

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "-": r"{-}",
    "[": r"{[}",
    "]": r"{]}",
}
"""The last three change with their neighbours: two hyphens become a dash, and a bracket after the end of a
row an option."""


def latex(text: object) -> str:
    """On one line, for running text and cells of tables; needs the package textcomp, as LaTeX has it since
    2020, and an input that is UTF-8. (A quote by its number: by name, fonts of the old encoding lack it.)"""
    return "".join(_LATEX.get(character, character) for character in printable(text))
