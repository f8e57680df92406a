"""The sections of a report: one object per topic, found in this package and computed in the order of `needs`.

A section is a subclass of `Section`; each module or package in here names its sections in `SECTIONS`. Nothing
else knows a topic by its name: summary.md, summary.tex, the CSV files, the plots and the page are made
by asking every section in turn. A new topic is one new file; docs/adding-a-section.md has an example.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol, TypeVar

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.figures.chart_data import Json
from bench.report.figures.spec import FigureSpec
from bench.report.text.listing import PageList
from bench.report.text.tables import Table

Data = TypeVar("Data")


class Section(Protocol[Data]):
    """One topic of a report. `Data` is a frame, or a frozen dataclass where one frame is not enough.

    Only `name`, `order` and `compute` are required; every other member has a default that adds nothing to the
    report. A section without tables and figures is left out of summary.md.
    """

    name: str
    """Unique among the sections; begins the labels of its tables in summary.tex."""
    order: int
    """The place in summary.md, in the head and on the page: sections are sorted by it, then by name."""
    title: str = ""
    """The heading in summary.md."""
    needs: tuple[str, ...] = ()
    """Names of the sections whose data `compute` reads."""
    lead: str = ""
    """A paragraph of Markdown beneath the heading."""
    marks: Mapping[str, str] = {}
    """Marks and their meanings, which are explained beneath the section where it uses them."""
    csv: tuple[str, ...] = ()
    """Names, without suffix, of the CSV files that the section may write; an earlier report's files of these
    names are removed."""
    front: bool = False
    """Whether summary.md begins with this section. If a section of this kind has tables, all others are
    folded behind it, with their figures that are not `front` themselves."""
    figures_first: bool = True
    """Whether the figures are above the tables."""
    figures_alone: bool = True
    """Whether summary.md has the section where it has figures and no table."""

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Data:
        """The section's data. `done` has the data of the sections in `needs`, by name."""
        ...

    def tables(self, data: Data) -> Sequence[Table]:
        """The tables of summary.md, folded ones last; those with a caption are in summary.tex too."""
        return ()

    def figures(self, data: Data) -> Sequence[FigureSpec]:
        """The figures; they are drawn in this order."""
        return ()

    def csv_tables(self, data: Data) -> Mapping[str, pd.DataFrame]:
        """The CSV files to write, by their names in `csv`. Without a method of its own, a section whose data
        is one frame with rows writes it to each name."""
        return dict.fromkeys(self.csv, data) if isinstance(data, pd.DataFrame) and len(data) else {}

    def facts(self, data: Data) -> Mapping[str, str]:
        """Lines for the report's head, by name."""
        return {}

    def warnings(self, data: Data) -> Sequence[str]:
        """Warnings about comparisons, for the head."""
        return ()

    def problems(self, data: Data) -> Sequence[str]:
        """Files that could not be read and were left out, a line each."""
        return ()

    def page_lists(self, data: Data) -> Sequence[PageList]:
        """Plain tables for the page."""
        return ()

    def page_data(self, data: Data) -> Json:
        """Keys of the page's JSON document, which its scripts read."""
        return {}

    def page_charts(self, data: Data) -> Mapping[str, list[Json]]:
        """Keys of the same document that hold charts; with any chart the page carries the charts' library."""
        return {}


@dataclass(frozen=True)
class Results:
    """The sections of one experiment's report with their data; iterates over (section, data) in order."""

    records: Experiment
    sections: tuple[Section[Any], ...]
    data: Mapping[str, Any]

    @cached_property
    def tables(self) -> Mapping[str, Sequence[Table]]:
        """The tables of each section, by its name."""
        return {section.name: section.tables(data) for section, data in self}

    def __iter__(self) -> Iterator[tuple[Section[Any], Any]]:
        return ((section, self.data[section.name]) for section in self.sections)


def compute(records: Experiment, sections: Sequence[Section[Any]]) -> Results:
    """The data of every section, computed in the order of their needs. Raises ValueError as `in_order`."""
    by_name = {section.name: section for section in in_order(sections)}
    data: dict[str, Any] = {}
    for name in _by_needs(by_name):
        section = by_name[name]
        data[name] = section.compute(records, {need: data[need] for need in section.needs})
    return Results(records, tuple(by_name.values()), data)


@cache
def discover() -> tuple[Section[Any], ...]:
    """The sections of every module in this package, in order. Raises ValueError as `in_order`, and for a
    module that names no sections."""
    every: list[Section[Any]] = []
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        sections = getattr(importlib.import_module(module.name), "SECTIONS", None)
        if not sections:
            raise ValueError(f"{module.name} has no SECTIONS; it must name its sections in a tuple")
        every.extend(sections)
    return in_order(every)


def in_order(sections: Sequence[Section[Any]]) -> tuple[Section[Any], ...]:
    """The sections by `order` and name.

    Raises ValueError for two of one name or with one CSV file, for a need that no section has, and for needs
    that form a cycle.
    """
    ranked = sorted(sections, key=lambda section: (section.order, section.name))
    names = [section.name for section in ranked]
    files = [name for section in ranked for name in section.csv]
    for kind, values in (("sections are named", names), ("sections write a CSV file named", files)):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"two {kind} {twice[0]!r}; choose another name for one of them")
    for section in ranked:
        for need in section.needs:
            if need not in names:
                near = get_close_matches(need, names, n=1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"section {section.name!r} needs {need!r}, which is no section{meant}")
    _by_needs({section.name: section for section in ranked})
    return tuple(ranked)


def _by_needs(sections: Mapping[str, Section[Any]]) -> list[str]:
    """The names so that each comes after its needs, else in the order given."""
    try:
        return list(TopologicalSorter({name: of.needs for name, of in sections.items()}).static_order())
    except CycleError as error:
        cycle = " → ".join(error.args[1])
        raise ValueError(f"sections need each other in a cycle: {cycle}") from error
