"""Ratios of cost against length: to dense attention, with rings where a variant becomes cheaper."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from bench.report.figures.lines import Look
from bench.report.figures.ratios import ratios


def crossover(cells: pd.DataFrame, look: Look) -> Figure | None:
    """Takes `crossover.compared`; see `ratios`."""
    title = "Cost over that of dense attention, against sequence length"
    return ratios(cells, look, title, "ratio to dense", rings="as dear as dense")
