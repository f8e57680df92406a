"""What follows from cost and quality: the sections on growth, crossover, fronts and utilisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from bench.report import (
    crossover,
    crossover_tables,
    markdown,
    pareto,
    pareto_tables,
    roofline,
    scaling,
    scaling_tables,
    statistics,
    tables,
    units,
)
from bench.report.columns import each
from bench.report.groups import GROUP, SETTING, TRAINING, describe, training
from bench.report.markdown import escape

MOST_OPEN = 4
"""Tables of a section that stand open; a reader opens the others."""
Plots = Mapping[str, Sequence[tuple[str, str]]]
"""Section (such as 'cost') → its plots, each a title and a path without suffix."""


@dataclass(frozen=True)
class Findings:
    """The frames of these sections, each as the module of its name makes it; any may be empty."""

    exponents: pd.DataFrame
    compared: pd.DataFrame
    crossovers: pd.DataFrame
    pareto: pd.DataFrame
    peaks: pd.DataFrame
    utilisation: pd.DataFrame


def find(frame: pd.DataFrame, cost: pd.DataFrame, quality: pd.DataFrame) -> Findings:
    """All of them, from the records of ordinary cells and what `statistics` makes of these."""
    peaks = roofline.peaks(frame)
    return Findings(
        exponents=scaling.exponents(cost),
        compared=crossover.compared(cost),
        crossovers=crossover.crossovers(cost, crossover.quality_loss(frame)),
        pareto=pareto.pareto_cells(statistics.summary(cost, quality)),
        peaks=peaks,
        utilisation=roofline.utilisation_cells(cost, peaks),
    )


def text(found: Findings, plots: Plots) -> str:
    """The sections, those without data left out."""
    parts = [
        _utilisation(found.peaks, plots.get("utilisation", ())),
        _scaling(found.exponents),
        _crossover(found.crossovers, plots.get("crossover", ())),
        _pareto(found.pareto, plots.get("pareto", ())),
    ]
    return "\n".join(part for part in parts if part)


def _utilisation(peaks: pd.DataFrame, plots: Sequence[tuple[str, str]]) -> str:
    lead = (
        "Algorithmic FLOPs of a step over its time, as a share of the best square matrix product that the "
        "machine was seen to do in the same type of numbers on the same threads. *copies*: bytes read plus "
        "bytes written."
    )
    if peaks.empty:
        return ""
    table = markdown.table(
        [
            each(peaks, "machine", "machine", str, right=False, optional=False),
            each(peaks, "threads", "threads", str),
            each(peaks, "numbers", "dtype", str, right=False),
            each(peaks, "matrix products", "peak_flops_per_second", lambda v: f"{units.flops(v)}/s"),
            each(peaks, "copies", "peak_bytes_per_second", lambda v: f"{units.size(v)}/s"),
        ]
    )
    return markdown.section("Utilisation", "\n".join([table, *_images(plots)]), {}, lead)


def _scaling(fits: pd.DataFrame) -> str:
    if fits.empty:
        return ""
    lead = (
        "The exponent with which a cost grows, its 95 % interval, and beside it the one that the variant's "
        "paper claims for attention: the slope of log cost against log length (or depth) by least squares, "
        f"over the largest sizes, those within a factor of {scaling.SPAN} of the largest and at least "
        f"{scaling.FEWEST}. A step has more than attention: projections and feed-forward layers grow as T, "
        "parameters not at all. *attention FLOPs* are by formula and free of both. *survey*: Tay et al., "
        "arXiv:2009.06732v3, Table 1."
    )
    notes = {
        scaling_tables.ABOVE: "grows faster than is claimed: the interval lies more than "
        f"{scaling.TOLERANCE:g} above the claim",
        scaling_tables.BELOW: f"grows more slowly than is claimed, by more than {scaling.TOLERANCE:g}: what "
        "grows less outweighs it at these sizes, or what the claim counts is not done, as where a fused "
        "kernel never holds the scores",
        scaling_tables.UNLIKE: "not what the attention's FLOPs grow with",
    }
    lengths, depths = fits[fits["axis"] == "seq_len"], fits[fits["axis"] == "depth"]
    parts: list[tuple[str, str, str]] = []
    for heading, keys, own in tables.headed(lengths, GROUP) if len(lengths) else ():
        parts.append((f"In the length: {heading}", keys, scaling_tables.by_length(own)))
    for heading, keys, own in tables.headed(depths, (*SETTING, "seq_len")) if len(depths) else ():
        parts.append((f"In the depth: {heading}", keys, scaling_tables.by_depth(own)))
    return markdown.section("Growth", _listed(parts), notes, lead)


def _crossover(cells: pd.DataFrame, plots: Sequence[tuple[str, str]]) -> str:
    if cells.empty:
        return ""
    lead = (
        "The length from which on a variant is cheaper than `dense` in the same setting, up to the longest "
        "measured: read off the line through the logarithms of the ratios at measured lengths. A ratio is "
        "the median over replicates, each against dense in the same replicate; in brackets, what its "
        "interval allows: the lengths from which on its lower and its upper end are cheaper. *loss over "
        "dense*: nats a token that the model loses after the same training, with the interval over "
        "replicates, at the trained length nearest to the crossover in time. An interval is one of 95 %, of "
        "two replicates their range."
    )
    groups = tables.headed(cells, GROUP)
    parts = _listed([(heading, keys, crossover_tables.crossovers(own)) for heading, keys, own in groups])
    return markdown.section("Crossover", "\n".join([*_images(plots), parts]), {}, lead)


def _pareto(cells: pd.DataFrame, plots: Sequence[tuple[str, str]]) -> str:
    if cells.empty:
        return ""
    lead = (
        "Models trained on equally many tokens, best first: mean quality and median cost over replicates "
        "with their 95 % intervals, of two replicates their range. A model is on the front of a cost where "
        "no other is as good and as cheap, and better in one."
    )
    notes = {
        pareto_tables.MAYBE: "another is better in both, but not beyond the intervals",
        tables.LEAK: "sees the future: on no front",
    }
    keys = [key for key in pareto.POOL if key not in (*TRAINING, "tokens_trained")]
    parts = []
    for values, own in pareto.pools(cells):
        asked = [key for key in TRAINING if key != "learning_rate" and not pd.isna(values[key])]
        trained = training(values, asked)
        heading = describe(values, ["objective", "corpus", "seq_len", "depth"])
        words = ", ".join([describe(values, keys), *trained])
        parts.append((heading, words, pareto_tables.pareto(own)))
    return markdown.section("Pareto fronts", "\n".join([*_images(plots), _listed(parts)]), notes, lead)


def _images(plots: Sequence[tuple[str, str]]) -> list[str]:
    return [markdown.image(*plot) for plot in plots]


def _listed(parts: Sequence[tuple[str, str, str]]) -> str:
    """Tables under their headings, each with its setting in words; those beyond `MOST_OPEN` are folded."""
    shown = []
    for number, (heading, words, table) in enumerate(parts):
        body = f"{escape(words)}\n\n{table}"
        folded = number >= MOST_OPEN
        shown.append(markdown.folded(heading, body) if folded else f"### {escape(heading)}\n\n{body}")
    return "\n".join(shown)
