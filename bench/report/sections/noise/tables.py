"""The machine's noise in the words of the report's head."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.noise_floor import ENOUGH
from bench.report.sections.noise.data import SUGGESTED
from bench.report.text import units


def facts(noise: pd.DataFrame) -> dict[str, str]:
    """Lines of the head, by name; takes `data.summary`."""
    lines: dict[str, list[str]] = {"noise floor": [], "A/A called different": [], "slowdowns found": []}
    for _, row in noise.iterrows():
        of = f"{row['machine']}: " if len(noise) > 1 else ""
        for name, phrase in zip(lines, (_floor(row), _called(row), _found(row)), strict=True):
            lines[name] += [of + phrase] if phrase else []
    return {name: "; ".join(phrases) for name, phrases in lines.items() if phrases}


def _floor(row: pd.Series[Any]) -> str:
    if not row["pairs"]:
        return "unknown, no A/A cells"
    pairs = f"{row['pairs']} A/A pair{'s' if row['pairs'] > 1 else ''}"
    if row["contaminated"]:
        pairs += f", {row['contaminated']} of them contaminated"
    basis = "95th percentile" if row["pairs"] >= ENOUGH else "estimated"
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
    if row["replicates"] < SUGGESTED:
        with_n[SUGGESTED] = row["found_suggested"]
    phrases = [f"with {n} replicates from {units.percent(ratio - 1)}" for n, ratio in with_n.items() if n > 1]
    return f"{', '.join(phrases)} (in 95 % of repeats, resampled from these pairs)"
