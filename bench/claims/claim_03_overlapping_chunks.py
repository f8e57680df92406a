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

from bench.claims.base import Judgement, Missing
from bench.claims.cells import (
    Spread,
    by_replicate,
    difference,
    disturbed,
    figure,
    finished,
    has,
    ratio,
    step_time,
)
from bench.claims.parts import above, exactly, knob, like, one_setting, points, reason, share, within
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


def flops(frame: pd.DataFrame) -> Judgement:
    """Judge the FLOPs at the longest common length."""
    chunks, overlaps = (finished(frame, variant=name) for name in ("chunked", "overlapping"))
    lengths = set(chunks["seq_len"]) & set(overlaps["seq_len"])
    if not lengths:
        raise Missing("variant=chunked and variant=overlapping at one length")
    longest = int(max(lengths))
    own = chunks[chunks["seq_len"] == longest]
    chunk, depth = int(knob(own, "chunk").iloc[0]), int(own.iloc[0]["depth"])
    own, other = (
        finished(rows, seq_len=longest, depth=depth, knobs={"chunk": chunk}) for rows in (own, overlaps)
    )
    attention, step = (
        figure(other, name) / figure(own, name) for name in ("flops_attention_step", "flops_algorithmic_step")
    )
    return Judgement(
        predicted=f"2 − c/T times the windows: {2 - chunk / longest:.4f} for chunks of {chunk} in "
        f"{longest:,} tokens. The output layer runs once per token in both.",
        measured=f"At {longest:,} tokens {units.ratio(attention)} the FLOPs of attention and "
        f"{units.ratio(step)} the FLOPs of a step.",
        verdict=exactly(abs(attention / 2 - 1) <= NEAR and abs(step / 2 - 1) <= NEAR),
        reason=f"attention costs {units.ratio(attention)} and a step {units.ratio(step)}",
    )


def time(frame: pd.DataFrame) -> Judgement:
    """Judge the time of the trained cells' steps."""
    chunked, overlapping, _ = _trained(frame)
    timed = ratio(overlapping, chunked, step_time(overlapping, chunked))
    counted = ratio(overlapping, chunked, "flops_algorithmic_step")
    verdict = within(timed, 2 * (1 - NEAR), 2 * (1 + NEAR))
    length, size = chunked.iloc[0]["seq_len"], int(knob(chunked, "chunk").iloc[0])
    return Judgement(
        predicted=f"2 − c/T: {2 - size / length:.4f} for chunks of {size} in {length:,} tokens.",
        measured=f"At {length:,} tokens a step takes {timed.text(units.ratio)} the time and "
        f"{units.ratio(counted.middle)} the FLOPs{disturbed(chunked, overlapping)}.",
        verdict=verdict,
        reason=reason(verdict, f"a step takes {units.ratio(timed.middle)} the time", timed),
    )


def edges(frame: pd.DataFrame) -> Judgement:
    """Judge whether the first half of a chunk loses more than dense attention does in the same places."""
    trained = _trained(frame)
    own, _, dense = trained
    lost = difference(own, dense, "edge")
    verdict, period = above(lost), int(own["place_period"].iloc[0])
    named = zip(trained._fields, trained, strict=True)
    starts = ", ".join(f"{name} {by_replicate(rows, 'start').median():.2f}" for name, rows in named)
    return Judgement(
        predicted=f"The first {period // 2} positions of a chunk have 0 to {period // 2 - 1} tokens of "
        "context.",
        measured=f"Excess loss of the first half of a chunk of {period} over the second, minus that of "
        f"dense: {lost.text(points)} nats per token. Loss at the first position of a chunk: {starts}.",
        verdict=verdict,
        reason=reason(verdict, "chunk edges do not increase the loss", lost),
    )


def recovery(frame: pd.DataFrame) -> Judgement:
    """Judge how much of the loss at edges overlap recovers; without such a loss, nothing is decided."""
    trained = _trained(frame)
    own, other, dense = trained
    lost, left, whole = (
        difference(own, dense, "edge"),
        difference(other, dense, "edge"),
        difference(other, own, "nll"),
    )
    back, period = _recovered(trained), int(own["place_period"].iloc[0])
    verdict = above(back, 1 - NEAR) if above(lost) == "shown" else "not decided here"
    instead = f"{share(back.middle)} of the loss at the edges is recovered"
    return Judgement(
        predicted=f"With overlap every position has {period // 2} or more tokens of context.",
        measured=f"Excess loss that remains: {left.text(points)} nats per token; recovered: "
        f"{back.text(share)}. Over all positions, overlapping minus chunked: {whole.text(points)}.",
        verdict=verdict,
        reason=reason(verdict, instead, back)
        if above(lost) == "shown"
        else "would need a loss at the edges of chunks",
    )


def _recovered(trained: Trained) -> Spread:
    """Return the share of the loss at chunk edges that overlapping chunks recover, paired by replicate."""
    chunked, overlapping, dense = (by_replicate(rows, "edge") for rows in trained)
    return Spread.plain((1 - (overlapping - dense) / (chunked - dense)).dropna())


PARTS = {
    "Overlapping half-chunks cost twice the FLOPs": flops,
    "They cost twice the time": time,
    "Chunk edges increase the loss": edges,
    "Overlap recovers what the edges lose": recovery,
}
