"""Training curves of an experiment's finished cells, read from the files in the folder of the records."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench import records

NEEDED = ("tokens", "nll")


def training_curves(frame: pd.DataFrame, folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The finished cells that have a curve, with it as `curve` (a frame of `tokens` and `nll`); problems.

    A file that is not a curve is a line in the problems, and its cell is left out.
    """
    rows, curves, problems = [], [], []
    for row, cell_id in frame.loc[frame["status"] == "ok", "cell_id"].items():
        path = records.curve_path_of(folder, str(cell_id))
        if not path.exists():
            continue
        try:
            curve = pd.read_csv(path, usecols=list(NEEDED), dtype=float)
        except (ValueError, OSError) as error:
            problems.append(f"{path}: not a training curve ({' '.join(str(error).split())})")
            continue
        if len(curve):
            rows.append(row)
            curves.append(curve)
    return frame.loc[rows].assign(curve=pd.Series(curves, index=rows, dtype=object)), problems
