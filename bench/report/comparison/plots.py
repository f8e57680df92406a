"""Ratios of the second run to the first against length, one figure a setting."""

from __future__ import annotations

from pathlib import Path

from bench.report.comparison.matching import SETTING, Comparison
from bench.report.data.groups import split, suffix, varying
from bench.report.figures import canvas
from bench.report.figures.drawing import Plots
from bench.report.figures.lines import Look
from bench.report.figures.ratios import ratios
from bench.report.figures.spec import Drawn
from bench.report.figures.style import styles
from bench.report.text.machines import dates, machines
from bench.report.text.phrases import describe

TITLE = "Cost of the second run over that of the first"


def draw(comparison: Comparison, folder: Path) -> Plots:
    """Write the figures into `folder`/plots; returns their titles and relative paths, by section."""
    cells = comparison.cells.assign(replicates=comparison.cells["rounds"])
    keys = [key for key in SETTING if key != "depth"]
    first, second = (run.collected.frame for run in comparison.runs)
    footer = f"{machines(first)}, {dates(first)} and {machines(second)}, {dates(second)}"
    looks = styles(zip(cells["variant"], cells["label"], strict=True))
    drawn: list[Drawn] = []
    with canvas.look():
        for values, part in split(cells, keys):
            look = Look(looks, describe(values, keys), footer)
            figure = ratios(part, look, TITLE, f"{comparison.runs[1].name} / {comparison.runs[0].name}")
            if figure is None:
                continue
            varying_keys = varying(cells, keys)
            name = f"compare{suffix(values, varying_keys)}"
            canvas.save(figure, folder / "plots", name)
            words = describe(values, varying_keys)
            drawn.append(Drawn(f"{TITLE} ({words})" if words else TITLE, f"plots/{name}"))
    return {"compare": drawn}
