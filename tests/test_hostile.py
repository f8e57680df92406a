"""Records are data: whatever they hold, reading them runs nothing, breaks nothing and is no markup."""

from __future__ import annotations

import json
import re
import typing
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import record

from bench import records
from bench.inputs.printable import printable
from bench.records import Record
from bench.report import build
from bench.report.text import escape, markdown
from bench.run.progress import describe

TEXTS = {
    "tag": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "quotes": "\" onmouseover='alert(1)' `",
    "table": "a | b || c \\| d \\",
    "code": "`` ` ```\ncode\n```",
    "lines": "one\n\n# two\r\n| three |\u2028four",
    "link": "[x](javascript:alert(1)) ![y](http://z)",
    "latex": r"\input{/etc/passwd} $x_1^2$ \\ & # % {~}",
    "formula": "$\\frac{$ $$",
    "ansi": "\x1b[31mred\x1b]0;title\x07\x9b2J\x08\x00",
    "direction": "abc\u202etxt.exe\u2066",
    "path": "../../../etc/passwd",
    "sheet": "=HYPERLINK(0)",
    "resolver": "${oc.env:HOME} {{config}} %s {0}",
    "long": "x" * 10_000_000,
    "nothing": "",
}
_HINTS = typing.get_type_hints(Record)
FIELDS = [k for k, hint in _HINTS.items() if hint in (str, str | None) and k != "cell_id"]


def hostile(text: str, number: int) -> Record:
    """A finished cell with the text wherever a record has text."""
    fields = dict.fromkeys(FIELDS, text[:5000]) | {"reason": text}
    knobs = {"plain": text[:5000], text[:1000]: [text[:1000], {"deeper": text[:1000]}]}
    return record(cell_id=f"h{number}", **fields | {"variant_params": knobs, "data_params": knobs})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with all of the texts, everywhere, and some cells that are as they should be."""
    folder = tmp_path_factory.mktemp("results") / "demo"
    for seq_len in (512, 1024):
        records.write(folder, record(seq_len=seq_len))
    for number, text in enumerate(TEXTS.values()):
        records.write(folder, hostile(text, number))
        failed = hostile(text, number)
        failed.status, failed.cell_id, failed.device = "error", f"f{number}", "cpu"
        records.write(folder, failed)
    found, problems = records.read_all(folder)
    assert (len(found), problems) == (2 + 2 * len(TEXTS), [])
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    """Its report with its plots."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|constrained_layout", UserWarning)  # as for any long label
        return build(folder)


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)(?:\\\\)*\|", line)


@pytest.mark.slow
def test_markdown_holds_no_markup_of_theirs(report: Path) -> None:
    text = (report / "summary.md").read_text()
    assert "\\<script" in text, "it is there, as text"
    assert re.findall(r"(?<!\\)<(?!/?(?:details|summary)>)", text) == []
    assert re.findall(r"(?<!\\)\]\(javascript", text) == []
    assert all(line.isprintable() for line in text.splitlines())
    assert len(text) < 1_000_000, "nothing huge is shown"
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 3
    for table in tables:
        assert len({len(cells(line)) for line in table.splitlines()}) == 1
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


@pytest.mark.slow
def test_files_stay_where_they_belong(report: Path) -> None:
    written = [path for path in report.parent.rglob("*") if path.is_file()]
    assert {path.parent for path in written} == {report, report / "plots", report.parent / "records"}
    assert all(re.fullmatch(r"[\w.=-]+", path.name) for path in written)
    assert list((report / "plots").glob("*.png"))
    for path in (report / "plots").glob("*.svg"):
        assert "<script" not in path.read_text()


def test_tables_of_data_hold_the_text_as_it_is(folder: Path) -> None:
    report = build(folder, plots=False)
    found = pd.read_parquet(report / "cells.parquet").set_index("cell_id")
    for number, text in enumerate(TEXTS.values()):
        assert found.loc[f"h{number}", "reason"] == text
        assert json.loads(found.loc[f"h{number}", "variant_params"])["plain"] == text[:5000]
    table = pd.read_csv(report / "summary.csv", dtype=str)
    assert list(table.columns)[:3] == ["objective", "corpus", "d_model"]
    assert table["replicates"].str.fullmatch(r"\d+").all(), "no text has run into another column"


def test_a_line_for_the_terminal_commands_nothing() -> None:
    for number, text in enumerate(TEXTS.values()):
        line = describe(hostile(text, number))
        assert line.isprintable()
        assert len(line) < 2100


def keys(**changed: Any) -> dict[str, Any]:
    return json.loads(record().to_json()) | changed


DEEP = "[" * 900 + "]" * 900
BAD: dict[str, tuple[str, str]] = {
    "NaN": (json.dumps(keys(nll=float("nan"))), "NaN is not a number"),
    "infinity": (json.dumps(keys(nll_by_position=[float("-inf")])), "-Infinity is not a number"),
    "beyond floats": (json.dumps(keys()).replace('"nll": 1', '"nll": 1e999, "was": 1'), ""),
    "huge": (json.dumps(keys(peak_bytes=10**400)), "allowed is 1 to 2⁶³ − 1"),
    "huge in a list": (json.dumps(keys(step_seconds_samples=[10**400])), "step_seconds_samples"),
    "huge length": (json.dumps(keys(seq_len=2**63)), "seq_len=9223372036854775808"),
    "no length": (json.dumps(keys(seq_len=0)), "seq_len=0"),
    "too many digits": (json.dumps(keys()).replace('"depth": 2', '"depth": ' + "9" * 5000), "not JSON"),
    "nested": (json.dumps(keys(variant_params={"x": "X"})).replace('"X"', DEEP), "deep"),
    "infinite knob": (json.dumps(keys(variant_params={"x": "X"})).replace('"X"', "1e999"), "variant_params"),
    "twice": (json.dumps(keys())[:-1] + ', "status": "error"}', "'status' appears twice"),
    "twice in knobs": (
        json.dumps(keys(variant_params={"x": "X"})).replace('"X"', '{"a":1,"a":2}'),
        "'a' appears twice",
    ),
    "half a character": (json.dumps(keys(reason="\ud800")), "surrogate"),
    "path": (json.dumps(keys(cell_id="../../x")), "not a file name"),
    "hidden": (json.dumps(keys(cell_id=".x")), "not a file name"),
    "true as a number": (json.dumps(keys(depth=True)), "wrong type in depth"),
    "a list of text": (json.dumps(keys(nll_by_position=["1"])), "nll_by_position"),
    "a code": (json.dumps(keys(variant={"_target_": "os.system"})), "wrong type in variant"),
    "unknown and rude": (json.dumps(keys(**{"\x1b[2J\n" * 50: 1})), "\\x1b[2J"),
    "status": (json.dumps(keys(status="\x1b[31m" + "y" * 10**6)), "status"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_is_named_in_a_line(kind: str) -> None:
    text, why = BAD[kind]
    with pytest.raises(records.RecordError) as said:
        records.parse(text, "here\x1b[2J.json")
    message = str(said.value)
    assert message.startswith("here\\x1b[2J.json: ")
    assert why in message
    assert message.isprintable()
    assert len(message) < 400


def test_special_files_are_not_read(tmp_path: Path) -> None:
    """One would never end, one would block for ever."""
    import os

    records.write(tmp_path, record(cell_id="good"))
    (tmp_path / "records/endless.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "records/pipe.json")
    with (tmp_path / "records/large.json").open("wb") as file:
        file.truncate(2**40)  # takes no room
    found, problems = records.read_all(tmp_path)
    assert [one.cell_id for one in found] == ["good"]
    assert len(problems) == 3
    assert records.read(tmp_path, "pipe") is None


def test_a_record_of_another_cell_is_not_taken_for_this_one(tmp_path: Path) -> None:
    path = records.write(tmp_path, record(cell_id="a"))
    path.rename(path.with_name("b.json"))
    assert records.read(tmp_path, "b") is None


@given(st.text(), st.integers(1, 50))
def test_printable_is_a_line_of_ink(text: str, most: int) -> None:
    assert printable(text).isprintable()
    assert len(printable(text, most)) <= most + 2
    if text.isprintable() and text == " ".join(text.split()):
        assert printable(text) == text


@given(st.sampled_from([text for text in TEXTS.values() if len(text) < 1000]) | st.text())
def test_latex_holds_no_command_but_those_for_characters(text: str) -> None:
    shown = escape.latex(text)
    left = re.sub(r"\\text[a-z]+\{\}|\\char34\{\}|\\[{}$&#%_]|\{[\[\]-]\}", "", shown)
    assert not set(left) & set("\\{}$&#%_^~<>|\"`'-[]")
    back = {value: key for key, value in escape._LATEX.items()}
    pattern = "|".join(re.escape(value) for value in sorted(back, key=len, reverse=True))
    assert re.sub(pattern, lambda match: back[match[0]], shown) == printable(text)


@given(st.text())
def test_markdown_in_a_cell_stays_in_it(text: str) -> None:
    shown = markdown.escape(text)
    assert len(cells(f"|{shown}|")) == 3
    assert shown.isprintable()
