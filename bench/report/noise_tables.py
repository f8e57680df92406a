"""The machine's noise in the head of a report, and the cells whose samples are not to be trusted."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report import markdown, noise, units
from bench.report.columns import each
from bench.report.groups import GROUP, varying
from bench.report.interval_cells import CONTAMINATED
from bench.report.tables import or_dash


def facts(found: pd.DataFrame) -> dict[str, str]:
    """Lines of the head, by name; takes `noise.summary`."""
    lines: dict[str, list[str]] = {"noise floor": [], "A/A called different": [], "slowdowns found": []}
    for _, row in found.iterrows():
        of = f"{row['machine']}: " if len(found) > 1 else ""
        for name, said in zip(lines, (_floor(row), _called(row), _found(row)), strict=True):
            lines[name] += [of + said] if said else []
    return {name: "; ".join(said) for name, said in lines.items() if said}


def _floor(row: pd.Series[Any]) -> str:
    if not row["pairs"]:
        return "unknown, no A/A cells"
    pairs = f"{row['pairs']} A/A pair{'s' if row['pairs'] > 1 else ''}"
    if row["contaminated"]:
        pairs += f", {row['contaminated']} of them contaminated"
    basis = "95th percentile" if row["pairs"] >= noise.ENOUGH else "estimated"
    return (
        f"{units.percent(row['floor'] - 1)} ({basis}, from {pairs}; half of them are within "
        f"{units.percent(row['median'] - 1)})"
    )


def _called(row: pd.Series[Any]) -> str:
    if not row["pairs"]:
        return ""
    if not row["judged"]:
        return "unknown, too few replicates or cells"
    return f"{row['called']} of {row['judged']} ({units.percent(row['called'] / row['judged'])})"


def _found(row: pd.Series[Any]) -> str:
    """With the replicates there are and with as many as are suggested, where those are more."""
    if not row["pairs"]:
        return ""
    with_n = {int(row["replicates"]): row["found"]}
    if row["replicates"] < noise.SUGGESTED:
        with_n[noise.SUGGESTED] = row["found_suggested"]
    said = [f"with {n} replicates from {units.percent(ratio - 1)}" for n, ratio in with_n.items() if n > 1]
    return f"{', '.join(said)} (in 95 % of repeats, resampled from these pairs)"


def contaminated(frame: pd.DataFrame) -> str:
    """Every finished record whose samples something else disturbed, with what it was."""
    found = disturbed(frame)
    if found.empty:
        return ""
    found = found.sort_values([*GROUP, "label", "seq_len", "replicate"])
    apart = [key for key in varying(frame, GROUP) if key != "depth"]
    return markdown.table(
        [
            each(found, "variant", "label", str, right=False, optional=False),
            each(found, "length", "seq_len", str, optional=False),
            each(found, "depth", "depth", str, optional=False),
            *(each(found, key, key, str, right=False) for key in apart),
            each(found, "replicate", "replicate", str, optional=False),
            each(found, "because", "contaminated", or_dash, right=False, optional=False),
        ]
    )


def warning(frame: pd.DataFrame) -> list[str]:
    """That there are such cells, for the head; nothing where there are none."""
    count = len(disturbed(frame))
    cells = f"{count} cell{'s' if count > 1 else ''}"
    return (
        [f"{cells} timed while something else ran: contaminated, {CONTAMINATED} in the tables"]
        if count
        else []
    )


def disturbed(frame: pd.DataFrame) -> pd.DataFrame:
    """The finished records whose samples something else disturbed."""
    return frame[(frame["status"] == "ok") & frame["contaminated"].notna()]
