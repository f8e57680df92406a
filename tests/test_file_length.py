"""A file reads in one sitting: at most 300 lines, or a stated reason in its first docstring."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 300
REASON = f"Over {MAX_LINES} lines: "
"""How the sentence with the reason begins."""

FILES = sorted(path for package in ("bench", "variants") for path in (ROOT / package).rglob("*.py"))


def states_reason(source: str) -> bool:
    """Return whether the module's docstring has the sentence, with a reason after the colon."""
    _, begins, reason = " ".join((ast.get_docstring(ast.parse(source)) or "").split()).partition(REASON)
    return bool(begins) and len(reason.partition(".")[0].split()) >= 3


def is_acceptable(source: str) -> bool:
    """Return whether a file is short, or long with a reason. A reason in a short file is out of date."""
    return (len(source.splitlines()) > MAX_LINES) == states_reason(source)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_long_file_states_its_reason(path: Path) -> None:
    source = path.read_text()
    lines = len(source.splitlines())
    assert is_acceptable(source), (
        f"{lines} lines; a file of more than {MAX_LINES} is split, or its first docstring has a sentence "
        f"that begins with {REASON!r}; a shorter file has none"
    )


@pytest.mark.parametrize(
    ("docstring", "lines", "expected"),
    [
        ("One idea.", 300, True),
        ("Two ideas.", 301, False),
        ("One idea.\n\nOver 300 lines: all of one table is here.", 301, True),
        ("One idea.\n\nOver 300\nlines: all of one table is here.", 301, True),
        ("One idea.\n\nOver 300 lines: .", 301, False),
        ("One idea.\n\nOver 300 lines: all of one table is here.", 300, False),
    ],
)
def test_the_limit_and_the_form_of_the_reason(docstring: str, lines: int, expected: bool) -> None:
    head = f'"""{docstring}"""\n'
    source = head + "x = 1\n" * (lines - head.count("\n"))
    assert is_acceptable(source) is expected
