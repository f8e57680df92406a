"""Records in a folder, and some sections of their report without the others: for tests of what these say.

A whole report takes several times as long.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from bench import records
from bench.records import Record
from bench.report import summary
from bench.report.data.experiment import read
from bench.report.data.files import csv
from bench.report.figures.drawing import Plots, draw_all
from bench.report.sections import Results, Section, compute, discover


def write(folder: Path, found: Iterable[Record]) -> Path:
    """Store them; an id that says in words what is special about a cell becomes the name of a file."""
    for one in found:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", one.cell_id, re.ASCII):
            one.cell_id = hashlib.sha256(one.cell_id.encode()).hexdigest()[:16]
        records.write(folder, one)
    return folder


def sections_of(*names: str) -> list[Section[Any]]:
    """The sections of these names and those that they need, directly or not."""
    by_name = {section.name: section for section in discover()}
    wanted = [*names]
    for name in wanted:  # grows
        wanted += [need for need in by_name[name].needs if need not in wanted]
    return [by_name[name] for name in wanted]


@dataclass(frozen=True)
class Part:
    """What these sections write into summary.md and the CSV files."""

    results: Results

    @cached_property
    def text(self) -> str:
        """summary.md, with the head and without figures."""
        return summary.text(self.results, {})

    def drawn(self, name: str) -> Plots:
        """The figures of one of the sections, which are drawn beside the records."""
        records = self.results.records
        specs = [section.figures(data) for section, data in self.results if section.name == name]
        return draw_all({name: specs[0]}, records.collected.frame, records.kinds, records.folder)[0]

    def files(self) -> dict[str, pd.DataFrame]:
        """The CSV files by name, as they are read back."""
        tables = [table for section, data in self.results for table in section.csv_tables(data).items()]
        return {name: pd.read_csv(io.StringIO(csv(frame))) for name, frame in tables}


def part_of(folder: Path, found: Iterable[Record], *names: str) -> Part:
    """The sections of these names, of these records, which are written into the folder."""
    return Part(compute(read(write(folder, found)), sections_of(*names)))
