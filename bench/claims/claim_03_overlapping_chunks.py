"""Overlapping half-chunks: their cost relative to chunks, and how much of the loss at chunk edges they
recover.

Within a model, the first and second halves of a chunk are compared. The same difference of `dense`, which
reads all earlier tokens, is subtracted, because it shows by how much the targets in the first half are
harder.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.claims.base import Finding, Missing, Verdict
from bench.claims.cells import Spread, by_replicate, difference, figure, finished, has, ratio, step_time
from bench.claims.parts import Part, knob, like, one_setting, points, share, together, unsure
from bench.report.text import units

STATEMENT = (
    "Overlapping half-chunks cost twice what chunks cost, and recover what chunk edges lose (loss by "
    "position within a chunk)."
)
SOURCE = "engineering practice; the cost by arithmetic"

NEAR = 0.1
"""Relative tolerance of *twice*, and the tolerated share of the loss that is not recovered."""


class Trained(NamedTuple):
    """Cells of one setting, each with the loss by position in a chunk."""

    chunked: pd.DataFrame
    overlapping: pd.DataFrame
    dense: pd.DataFrame


def judge(frame: pd.DataFrame) -> Finding:
    """Judge the cost at the longest common length, and the quality from the cells with a loss by position."""
    trained = _trained(frame)
    return together([_cost(frame, trained), _edges(trained)])


def halves(nll_by_place: list[float]) -> float:
    """Return the loss of the first half of a chunk minus that of the second, in nats per token."""
    *first, second = nll_by_place
    places = np.maximum(1, 2 ** (np.arange(len(first)) - 1.0))  # element 0 is one position, k > 0 2^(k − 1)
    return float(np.average(np.asarray(first, dtype=float), weights=places) - second)


def _trained(frame: pd.DataFrame) -> Trained:
    own = has(finished(frame, variant="chunked"), "nll_by_place")
    own = own[knob(own, "chunk") == own["place_period"]]
    if own.empty:
        raise Missing("variant=chunked: no nll_by_place with the chunk as its period")
    own = one_setting(own)
    chunk = {"chunk": int(knob(own, "chunk").iloc[0])}
    setting = {**like(own), "place_period": chunk["chunk"]}
    cells_of_each = (
        finished(frame, variant=name, knobs=knobs, **setting)
        for name, knobs in (("chunked", chunk), ("overlapping", chunk), ("dense", {}))
    )
    each = (has(rows, "nll_by_place") for rows in cells_of_each)
    rows = [
        part.assign(edge=part["nll_by_place"].map(halves), start=[nll[0] for nll in part["nll_by_place"]])
        for part in each
    ]
    return Trained(*rows)


def _cost(frame: pd.DataFrame, trained: Trained) -> Part:
    chunks, overlaps = (finished(frame, variant=name) for name in ("chunked", "overlapping"))
    longest = int(max(set(chunks["seq_len"]) & set(overlaps["seq_len"])))
    own = chunks[chunks["seq_len"] == longest]
    chunk, depth = int(knob(own, "chunk").iloc[0]), own.iloc[0]["depth"]
    own, other = (
        finished(rows, seq_len=longest, depth=depth, knobs={"chunk": chunk}) for rows in (own, overlaps)
    )
    attention, step = (
        figure(other, name) / figure(own, name) for name in ("flops_attention_step", "flops_algorithmic_step")
    )
    timed = ratio(trained.overlapping, trained.chunked, step_time(trained.overlapping, trained.chunked))
    counted = ratio(trained.overlapping, trained.chunked, "flops_algorithmic_step")
    short, size = trained.chunked.iloc[0]["seq_len"], int(knob(trained.chunked, "chunk").iloc[0])
    right = abs(attention / 2 - 1) <= NEAR and abs(step / 2 - 1) <= NEAR
    return Part(
        predicted=f"2 − c/T times the windows: {2 - chunk / longest:.4f} for chunks of {chunk} in "
        f"{longest:,} tokens, {2 - size / short:.4f} for {size} in {short:,}. The output layer runs once per "
        "token in both.",
        measured=f"At {longest:,} tokens {units.ratio(attention)} the FLOPs of attention and "
        f"{units.ratio(step)} the FLOPs of a step; at {short:,} tokens {units.ratio(counted.middle)} the "
        f"FLOPs of a step and {timed.text(units.ratio)} its time.",
        verdict="holds" if right else "does not hold here",
        but=f"attention costs {units.ratio(attention)} and a step {units.ratio(step)}",
    )


def _edges(trained: Trained) -> Part:
    own, other, dense = trained
    lost, left = difference(own, dense, "edge"), difference(other, dense, "edge")
    back, whole = _recovered(trained), difference(other, own, "nll")
    verdict, but = _judged(lost, back, whole)
    period = int(own["place_period"].iloc[0])
    named = zip(trained._fields, trained, strict=True)
    starts = ", ".join(f"{name} {by_replicate(rows, 'start').median():.2f}" for name, rows in named)
    return Part(
        predicted=f"The first {period // 2} positions of a chunk have 0 to {period // 2 - 1} tokens of "
        f"context; with overlap every position has {period // 2} or more.",
        measured=f"Excess loss of the first half of a chunk of {period} over the second, minus that of "
        f"dense: chunked {lost.text(points)} nats per token, overlapping {left.text(points)}; recovered: "
        f"{back.text(share)}. Loss at the first position of a chunk: {starts}. Over all positions, "
        f"overlapping minus chunked: {whole.text(points)}.",
        verdict=verdict,
        but=but,
    )


def _recovered(trained: Trained) -> Spread:
    """Return the share of the loss at chunk edges that overlapping chunks recover, paired by replicate."""
    chunked, overlapping, dense = (by_replicate(rows, "edge") for rows in trained)
    return Spread.plain((1 - (overlapping - dense) / (chunked - dense)).dropna())


def _judged(lost: Spread, back: Spread, whole: Spread) -> tuple[Verdict, str]:
    """Return the verdict and its condition."""
    if lost.middle <= 0:
        return "does not hold here", "chunk edges do not increase the loss"
    if lost.count < 2 or lost.low <= 0:
        return "holds with a condition", f"chunk edges increase the loss, but {unsure(lost)}"
    if back.low < 1 - NEAR:
        verdict: Verdict = "holds with a condition" if back.low > 0.5 else "does not hold here"
        return verdict, f"possibly only {share(back.low)} of the loss at the edges is recovered"
    if whole.low > 0:
        words = "the loss at the edges is recovered, but the rest of a chunk is worse by more: over all"
        more = f"positions, overlapping minus chunked is {points(whole.middle)} nats per token"
        return "holds with a condition", f"{words} {more}"
    return "holds", ""
