"""Overlapping half-chunks: what they cost over chunks, and what of the loss at chunk edges they take back.

Places of a chunk are compared within a model, first half less second half, and the same of `dense` is taken
off, which reads all that comes before and so says by how much the targets there are harder.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.claims.base import Finding, Missing, Verdict
from bench.claims.cells import Spread, by_replicate, difference, figure, finished, has, ratio
from bench.claims.parts import Part, knob, like, one_setting, points, share, together, unsure
from bench.report.text import units

STATEMENT = (
    "Overlapping half-chunks cost twice what chunks cost, and recover what chunk edges lose (loss by "
    "position within a chunk)."
)
SOURCE = "engineering practice; the cost by arithmetic"

NEAR = 0.1
"""How far from twice a cost may be and count as twice; and how much of the loss may not come back."""


class Trained(NamedTuple):
    """Cells of one setting, each with a loss by place in a chunk."""

    chunked: pd.DataFrame
    overlapping: pd.DataFrame
    dense: pd.DataFrame


def judge(frame: pd.DataFrame) -> Finding:
    """Cost from the longest length that both have, quality from the cells with a loss by place."""
    trained = _trained(frame)
    return together([_cost(frame, trained), _edges(trained)])


def halves(nll_by_place: list[float]) -> float:
    """By how much the first half of a chunk is harder than the second, in nats a token."""
    *first, second = nll_by_place
    places = np.maximum(1, 2 ** (np.arange(len(first)) - 1.0))  # element 0 is one place, k > 0 2^(k − 1)
    return float(np.average(np.asarray(first, dtype=float), weights=places) - second)


def _trained(frame: pd.DataFrame) -> Trained:
    own = has(finished(frame, variant="chunked"), "nll_by_place")
    own = own[knob(own, "chunk") == own["place_period"]]
    if own.empty:
        raise Missing("variant=chunked: no nll_by_place in parts of a chunk's length")
    own = one_setting(own)
    chunk = {"chunk": int(knob(own, "chunk").iloc[0])}
    setting = {**like(own), "place_period": chunk["chunk"]}
    found = (
        finished(frame, variant=name, knobs=knobs, **setting)
        for name, knobs in (("chunked", chunk), ("overlapping", chunk), ("dense", {}))
    )
    each = (has(rows, "nll_by_place") for rows in found)
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
    timed = ratio(trained.overlapping, trained.chunked, "step_seconds_median")
    counted = ratio(trained.overlapping, trained.chunked, "flops_algorithmic_step")
    short, size = trained.chunked.iloc[0]["seq_len"], int(knob(trained.chunked, "chunk").iloc[0])
    right = abs(attention / 2 - 1) <= NEAR and abs(step / 2 - 1) <= NEAR
    return Part(
        predicted=f"2 − c/T times the windows: {2 - chunk / longest:.4f} at chunks of {chunk} in "
        f"{longest:,} tokens, {2 - size / short:.4f} at {size} in {short:,}. The output layer runs once a "
        "token in both.",
        measured=f"At {longest:,} tokens {units.ratio(attention)} the FLOPs of attention and "
        f"{units.ratio(step)} those of a step; at {short:,} {units.ratio(counted.middle)} those of a step, "
        f"and its time is {timed.said(units.ratio)}.",
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
        predicted=f"A chunk's first {period // 2} places have 0 to {period // 2 - 1} tokens before them; "
        f"with overlap every place has {period // 2} or more.",
        measured=f"First half less second half of a chunk of {period}, less the same of dense: chunked "
        f"{lost.said(points)} nats a token, overlapping {left.said(points)}; of it comes back "
        f"{back.said(share)}. Loss at a chunk's first place: {starts}. Over all places, overlapping less "
        f"chunked: {whole.said(points)}.",
        verdict=verdict,
        but=but,
    )


def _recovered(trained: Trained) -> Spread:
    """Of what chunks lose at their edges, the share that overlapping ones do not, within each replicate."""
    chunked, overlapping, dense = (by_replicate(rows, "edge") for rows in trained)
    return Spread.plain((1 - (overlapping - dense) / (chunked - dense)).dropna())


def _judged(lost: Spread, back: Spread, whole: Spread) -> tuple[Verdict, str]:
    """What follows, and what it is subject to."""
    if lost.middle <= 0:
        return "does not hold here", "chunk edges lose nothing"
    if lost.count < 2 or lost.low <= 0:
        return "holds with a condition", f"chunk edges lose, but {unsure(lost)}"
    if back.low < 1 - NEAR:
        verdict: Verdict = "holds with a condition" if back.low > 0.5 else "does not hold here"
        return verdict, f"of what the edges lose, as little as {share(back.low)} may come back"
    if whole.low > 0:
        words = "what the edges lose comes back, but the rest of a chunk is worse by more: overlapping chunks"
        return "holds with a condition", f"{words} lose {points(whole.middle)} nats a token over all places"
    return "holds", ""
