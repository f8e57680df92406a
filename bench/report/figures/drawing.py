"""Draws the figures of a report and writes them, one figure a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.report.data.groups import split, suffix, varying
from bench.report.data.kinds import Kinds
from bench.report.figures import canvas
from bench.report.figures.lines import Look
from bench.report.figures.selection import MOST, Selection
from bench.report.figures.spec import Drawn, FigureSpec
from bench.report.figures.style import styles
from bench.report.text.machines import dates, machines
from bench.report.text.phrases import describe

MOST_NAME = 160
"""Characters of a plot's file name; file systems allow 255 bytes, with the suffix and a number."""
Setting = tuple[str, dict[str, Any], pd.DataFrame]
"""A figure to draw: the words under which it is linked, the values of its keys and its cells."""
Plots = Mapping[str, Sequence[Drawn]]
"""Name of a section → its figures."""


def draw_all(
    specs_of: Mapping[str, Sequence[FigureSpec]],
    frame: pd.DataFrame,
    kinds: Kinds,
    report: Path,
    max_settings: int | None = None,
    max_variants: int | None = MOST,
) -> tuple[dict[str, list[Drawn]], int]:
    """Write every figure that has data into `report`/plots, as PNG and SVG.

    `specs_of` has the figures of each section by its name; `frame` has all records, so that a variant looks
    the same in every figure. With `max_settings`, only that number of settings is drawn for each kind of
    figure: those with the most cells. `max_variants` is the number of variants in a figure.
    Returns the figures by section, and the number of figures that were not drawn.
    """
    looks = styles(zip(frame["variant"], frame["label"], strict=True))
    selection = Selection.of(frame, max_variants)
    drawn: dict[str, list[Drawn]] = {}
    undrawn = 0
    used_names: set[str] = set()
    with canvas.look():
        for section, spec in ((name, spec) for name, specs in specs_of.items() for spec in specs):
            if spec.cells.empty:
                continue
            records: pd.DataFrame = getattr(kinds, spec.kind)
            varying_keys = varying(records, spec.keys)
            settings = [
                (spec.linked(values), values, part)
                for values, part in split(spec.cells, spec.keys)
                if spec.condition(values, part)
            ]
            shown = settings if max_settings is None else _fullest(settings, max_settings)
            undrawn += len(settings) - len(shown)
            for linked, values, part in shown:
                same = _same(records, values)
                setting = describe(values, [k for k in spec.keys if k not in ("machine", "threads")])
                cells, left_out = (part, "") if spec.all_variants else selection.part(part, spec.always(part))
                footer = f"{machines(same)} · {dates(same)}{left_out}"
                figure = spec.draw(cells, Look(looks, setting, footer))
                if figure is None:
                    continue
                name = _free((spec.stem + suffix(values, varying_keys))[:MOST_NAME], used_names)
                canvas.save(figure, report / "plots", name)
                words = describe(values, varying_keys)
                title = f"{spec.title} ({words})" if words else spec.title
                drawn.setdefault(section, []).append(Drawn(title, f"plots/{name}", linked, spec.front))
    return drawn, undrawn


def _fullest(settings: list[Setting], count: int) -> list[Setting]:
    """Return the `count` settings with the most rows, in their order; shown figures precede linked ones."""
    ranked = sorted(settings, key=lambda one: (bool(one[0]), -len(one[2])))
    shown = {id(one) for one in ranked[:count]}
    return [one for one in settings if id(one) in shown]


def _same(frame: pd.DataFrame, values: dict[str, Any]) -> pd.DataFrame:
    """The records of one setting."""
    return frame[(frame[list(values)] == pd.Series(values)).all(axis=1)]


def _free(name: str, used: set[str]) -> str:
    """The name, with a number where two settings differ only in characters a file name cannot hold."""
    number, free = 1, name
    while free in used:
        number += 1
        free = f"{name}-{number}"
    used.add(free)
    return free
