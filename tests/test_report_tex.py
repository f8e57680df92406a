"""summary.tex says what summary.md says, and nothing that a record holds is read as LaTeX."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_SECONDS
from report_parts import part_of
from test_report import record, sweep, write

from bench.report import build, summary
from bench.report.data.experiment import read
from bench.report.sections import compute, discover
from bench.report.text import latex
from bench.report.text.columns import Column

PLAIN = {
    r"\%": "%",
    r"\_": "_",
    r"$\times$": "×",
    "--": "–",
    r"$\approx$": "≈",
    r"$\pm$": "±",
    r"$\geq$": "≥",
    "$-$": "−",
}
PLAIN |= {"{-}": "-", "{[}": "[", "{]}": "]"}
PLAIN |= {r"\textsuperscript{r}": "ʳ", r"\textsuperscript{p}": "ᵖ", r"\textdagger{}": "†", r"\S{}": "§"}
HOSTILE = r"\input{/etc/passwd} $x^2$ 50% of_all {a} & #1 ~ ^ <b> | `c` " + '"q" [d] \u202e \U0001f600\nnext'


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table, as plain text."""
    for mark, plain in PLAIN.items():
        text = text.replace(mark, plain)
    return [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r" \\")]


def test_the_same_figures_as_in_markdown(tmp_path: Path) -> None:
    results = compute(read(write(tmp_path / "e", sweep())), discover())
    markdown, found = summary.text(results, {}), rows(summary.tex(results))
    assert len(found) > 30
    for row in found:
        pattern = r"\| *" + r" *\| *".join(re.escape(cell) for cell in row) + r" *\|"
        assert re.search(pattern, markdown), row


def test_marks_are_explained_where_they_are_used(tmp_path: Path) -> None:
    predicted = [record(seq_len=n, peak_bytes=None, peak_bytes_source="predicted") for n in (512, 1024)]
    leaking = [record("chunked", n, leak_max_abs=0.5) for n in (512, 1024)]
    text = summary.tex(part_of(tmp_path / "e", [*predicted, *leaking], "cost", "quality").results)
    assert r"\textsuperscript{p} predicted, not measured.\par" in text
    assert text.count(r"\textdagger{} sees the future") == 2  # of cost, and of quality
    assert r"\S{} timed" not in text


def test_nothing_is_markup() -> None:
    text = latex.escape(HOSTILE)
    assert "\n" not in text
    assert r"\textbackslash{}u202e" in text
    assert "{[}U+1F600{]}" in text
    commands = set(re.findall(r"\\([A-Za-z]+)", text))
    assert commands == {
        "textbackslash",
        "textasciitilde",
        "textasciicircum",
        "textless",
        "textgreater",
        "textbar",
        "textasciigrave",
        "char",
    }
    assert not re.search(r"(?<!\\)[$&#%_]", text)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_takes_it(tmp_path: Path) -> None:
    hostile = Column(HOSTILE, [HOSTILE, "[1]", *latex._SIGNS], right=False)
    (tmp_path / "t.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
        + latex.table([hostile], caption=HOSTILE, label="tab:h", notes={"†": HOSTILE})
        + "\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )
    assert ran.returncode == 0, ran.stdout[-2000:]


@pytest.mark.slow
def test_a_choice_of_columns(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", sweep())
    path = folder / "report" / "summary.tex"
    build(folder, plots=False)
    whole = rows(path.read_text())
    command = [sys.executable, "-m", "bench.report", str(folder), "--no-plots", "--tex-columns"]
    subprocess.run([*command, "step time, time / dense"], check=True, capture_output=True)
    few = rows(path.read_text())
    assert {"variant", "step time"} <= {*few[0]} < {*whole[0]}
    place = whole[0].index("step time")
    assert [row[few[0].index("step time")] for row in few] == [row[place] for row in whole[: len(few)]]
    run = subprocess.run([*command, "step tme"], check=False, capture_output=True, text=True)
    assert run.returncode == 2
    assert "column=step tme: unknown" in run.stderr
    assert "did you mean step time?" in run.stderr
    assert rows(path.read_text()) == few, "the report is as it was"
