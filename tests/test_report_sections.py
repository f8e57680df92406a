"""Sections of the report: a new one needs no other file, needs have no cycle, no topic is known by name."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from report_parts import sections_of
from test_imports import modules, ours
from test_report import record, write

from bench.report import builder, sections
from bench.report.data.experiment import Experiment, read
from bench.report.data.groups import SETTING
from bench.report.figures import canvas
from bench.report.figures.lines import Look
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section, compute, discover, in_order
from bench.report.text.columns import each
from bench.report.text.listing import PageList, listed_columns
from bench.report.text.tables import Table

PACKAGE = "bench.report.sections"


class Heads(Section[pd.DataFrame]):
    """Heads by variant; something that no other section shows."""

    name = "heads"
    order = 25
    title = "Counted heads"
    needs = ("cost",)
    lead = "How many heads *each* has."
    csv = ("heads",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        assert set(done) == {"cost"}, "a section sees the data that it asks for and no other"
        cells: pd.DataFrame = done["cost"]
        return cells[[*SETTING, "depth", "variant", "label", "seq_len"]]

    def tables(self, data: pd.DataFrame) -> list[Table]:
        columns = [each(data, "variant", "label", str, right=False), each(data, "counted", "heads", str)]
        return [Table(columns, "By <variant>", note="Counted.", caption="Heads of a model")]

    def figures(self, data: pd.DataFrame) -> list[FigureSpec]:
        def draw(cells: pd.DataFrame, look: Look) -> Figure:
            figure, (axis,) = canvas.panels(1)
            axis.plot(cells["seq_len"], cells["heads"])
            canvas.dress(figure, "Heads", look.setting, look.footer, [])
            return figure

        return [FigureSpec("heads", "Heads against length", data, draw, SETTING)]

    def facts(self, data: pd.DataFrame) -> dict[str, str]:
        return {"most heads": str(data["heads"].max())}

    def warnings(self, data: pd.DataFrame) -> list[str]:
        return ["heads were counted"]

    def page_lists(self, data: pd.DataFrame) -> list[PageList]:
        return [PageList("heads", "Counted heads", "Heads", listed_columns(self.tables(data)[0].columns))]

    def page_data(self, data: pd.DataFrame) -> dict[str, Any]:
        return {"heads": [int(n) for n in data["heads"]]}


class Named(Section[None]):
    """A section with a name and needs, and no more."""

    def __init__(self, name: str, *needs: str, order: int = 0, csv: tuple[str, ...] = ()) -> None:
        self.name, self.needs, self.order, self.csv = name, needs, order, csv

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> None:
        return None


def is_everywhere(report: Path) -> None:
    """The section `Heads` is in every output of the report."""
    text = (report / "summary.md").read_text()
    section = text.split("## Counted heads\n")[1].split("\n## ")[0]
    assert "How many heads *each* has." in section
    assert r"### By \<variant>" in section
    assert section.rstrip().endswith("Counted.")
    assert "](plots/heads.png)" in section
    assert text.index("## Cost") < text.index("## Counted heads") < text.index("## Parameters")
    assert "- most heads: 4\n" in text
    assert "- **heads were counted**" in text
    assert set(pd.read_csv(report / "heads.csv").heads) == {4}
    for kind in ("png", "svg"):
        assert (report / "plots" / f"heads.{kind}").stat().st_size > 0
    tex = (report / "summary.tex").read_text()
    assert r"\caption{Heads of a model, 2026" in tex
    assert r"\label{tab:heads-1}" in tex
    page = (report / "index.html").read_text()
    assert '<a href="#heads">Counted heads</a>' in page
    assert '<h2 id="heads-title">Counted heads</h2>' in page
    assert '<th scope="col">counted</th>' in page
    assert '"heads":[4,4]' in page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "e", [record("dense"), record("chunked")])


@pytest.mark.slow
def test_a_section_that_is_given_is_in_every_output(folder: Path) -> None:
    report = builder.build_report(folder, sections=[*discover(), Heads()])
    is_everywhere(report)
    builder.build_report(folder, plots=False)
    assert (report / "heads.csv").exists(), "a report without the section does not know the file"
    assert "Counted heads" not in (report / "summary.md").read_text()


def test_a_section_in_a_new_file_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module in the package's path is all that a section needs."""
    more = tmp_path / "more"
    more.mkdir()
    (more / "counted_heads.py").write_text(
        "from test_report_sections import Heads\n\nSECTIONS = (Heads(),)\n", encoding="utf-8"
    )
    monkeypatch.setattr(sections, "__path__", [*sections.__path__, str(more)])
    discover.cache_clear()
    try:
        report = builder.build_report(folder)
    finally:
        discover.cache_clear()
        sys.modules.pop(f"{PACKAGE}.counted_heads", None)
    is_everywhere(report)


def test_a_module_without_sections_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing.py").write_text("")
    monkeypatch.setattr(sections, "__path__", [str(tmp_path)])
    discover.cache_clear()
    try:
        with pytest.raises(ValueError, match=rf"^{re.escape(PACKAGE)}.nothing has no SECTIONS"):
            discover()
    finally:
        discover.cache_clear()
        sys.modules.pop(f"{PACKAGE}.nothing", None)


def test_every_section_computes_what_a_section_that_needs_it_reads(folder: Path) -> None:
    """Each section with those it needs, directly or not, and no other."""
    records = read(folder)
    names = [section.name for section in discover()]
    assert len(names) > 15
    for name in names:
        wanted = sections_of(name)
        assert name in compute(records, wanted).data


def test_sections_are_in_order_and_their_needs_come_first(folder: Path) -> None:
    seen = []

    class Seen(Named):
        def compute(self, records: Experiment, done: Mapping[str, Any]) -> None:
            assert set(done) == set(self.needs)
            seen.append(self.name)

    found = compute(read(folder), [Seen("b", "c", order=1), Seen("a", order=2), Seen("c", "a", order=3)])
    assert [section.name for section, _ in found] == ["b", "a", "c"]
    assert seen == ["a", "c", "b"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((Named("a"), Named("a")), "two sections are named 'a'"),
        ((Named("a", csv=("x",)), Named("b", csv=("x",))), "two sections write a CSV file named 'x'"),
        (
            (Named("cost"), Named("b", "costs")),
            "section 'b' needs 'costs', which is no section; did you",
        ),
        ((Named("a", "b"), Named("b", "a")), "sections need each other in a cycle: "),
    ],
)
def test_sections_that_do_not_fit_together_are_one_line(wrong: tuple[Named, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as raised:
        in_order(wrong)
    assert "\n" not in str(raised.value)


class Undeclared(Heads):
    csv = ()

    def csv_tables(self, data: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return {"heads": data}


class Taken(Heads):
    def page_data(self, data: pd.DataFrame) -> dict[str, Any]:
        return {"label": []}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Undeclared(), "section 'heads' writes heads.csv, which its csv does not name"),
        (Taken(), "two sections give the page 'label'; choose another name for one of them"),
    ],
)
def test_a_section_that_would_overwrite_is_one_line(folder: Path, wrong: Heads, message: str) -> None:
    """A file that no later report would remove, or the data of another section on the page."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        builder.build_report(folder, plots=False, sections=[*sections_of("cells"), wrong])
    assert not (folder / "report" / "summary.md").exists()


def test_a_section_without_data_has_neither_heading_nor_file(folder: Path) -> None:
    """Two cells of one length: no growth, no crossover, no budgets, no training curves."""
    report = builder.build_report(folder, plots=False)
    files = {"summary", "noise", "noise_by_length", "pareto", "differences"}
    assert {path.stem for path in report.glob("*.csv")} == files
    headings = re.findall(r"^## (.*)$", (report / "summary.md").read_text(), re.M)
    expected = ["Which one?", "Cost", "Pareto fronts", "Memory", "Quality", "Parameters", "Gates", "Noise"]
    assert headings == expected


# --- read from the sources ------------------------------------------------------------------------


def topic(module: str) -> str:
    """The topic that a module belongs to; empty for one outside the sections, and for their package."""
    return module.removeprefix(f"{PACKAGE}.").partition(".")[0] if module.startswith(f"{PACKAGE}.") else ""


OUTSIDE = [name for name in sorted(modules()) if name.startswith("bench.report") and not topic(name)]


def test_there_are_topics_and_modules_outside_them() -> None:
    assert len({topic(name) for name in modules()} - {""}) > 12
    assert {"bench.report.builder", "bench.report.summary", "bench.report.page"} <= {*OUTSIDE}


@pytest.mark.parametrize("module", OUTSIDE)
def test_no_module_outside_the_sections_imports_a_topic(module: str) -> None:
    assert not [target for target in ours(module) if topic(target)]


@pytest.mark.parametrize("module", sorted(name for name in modules() if topic(name)))
def test_a_topic_imports_another_only_if_it_needs_its_data(module: str) -> None:
    of_topic = {section.name: topic(type(section).__module__) for section in discover()}
    needs = {of_topic[need] for s in discover() if of_topic[s.name] == topic(module) for need in s.needs}
    assert {topic(target) for target in ours(module)} - {""} <= needs | {topic(module)}
