"""Factorised sparse patterns: FLOPs that they save, and the pairs that two layers connect."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bench.claims.base import Judgement
from bench.claims.cells import Spread, disturbed, figure, finished, has, ratio, step_time
from bench.claims.parts import exactly
from bench.report.text import units

STATEMENT = (
    "The factorised sparse pattern saves a factor of about √T (90 at 8,096 tokens), and connects any two "
    "positions in two layers."
)
SOURCE = "Child 2019, arXiv:1904.10509, §4.2–4.3 and abstract (O(n·√n))"
VARIANTS = ("sparse_strided", "sparse_fixed")
MODES = ("merged", "split", "interleaved")
LENGTHS = (1024, 4096, 8096)
LONGEST = 8096
CONNECTED_AT = 1024
"""Length at which the connected pairs are computed."""
ABOUT = 0.1
"""Relative tolerance of *about* for the factor."""
EXPONENT, CLOSE = 0.5, 0.05
"""The claimed exponent of the saving, and the tolerance for a fit."""


def savings(frame: pd.DataFrame, variant: str, mode: str) -> dict[int, float]:
    """Return tokens → attention FLOPs of dense ÷ those of the pattern, causal, by formula."""
    plans: dict[str, Any] = {
        "measure": "plan",
        "depth": 2,
        "objective": "clm",
        "d_model": 64,
        "batch_size": 1,
    }
    factors = {}
    for t in LENGTHS:
        dense = figure(finished(frame, variant="dense", seq_len=t, **plans), "flops_attention_step")
        knobs = {"head_mode": mode, "stride": round(math.sqrt(t))}
        sparse = finished(frame, variant=variant, seq_len=t, **plans, knobs=knobs)
        factors[t] = dense / figure(sparse, "flops_attention_step")
    return factors


def connected(frame: pd.DataFrame, depth: int) -> tuple[float, float]:
    """Return the minimum and maximum share of the allowed pairs that the layers connect,
    over patterns and modes."""
    shares = [
        figure(
            has(
                finished(
                    frame,
                    variant=variant,
                    seq_len=CONNECTED_AT,
                    depth=depth,
                    objective="clm",
                    measure="plan",
                    knobs={"head_mode": mode},
                ),
                "connected_share",
            ),
            "connected_share",
        )
        for variant in VARIANTS
        for mode in MODES
    ]
    return min(shares), max(shares)


def timed(frame: pd.DataFrame) -> tuple[Spread, str]:
    """Return the step time of dense ÷ that of the strided pattern,
    with one layer, and the note on contamination."""
    run: dict[str, Any] = {
        "seq_len": LONGEST,
        "depth": 1,
        "measure": "quick",
        "objective": "clm",
        "d_model": 256,
    }
    dense = finished(frame, variant="dense", activations="keep", **run)
    sparse = finished(
        frame,
        variant="sparse_strided",
        activations="keep",
        **run,
        knobs={"stride": round(math.sqrt(LONGEST))},
    )
    return ratio(dense, sparse, step_time(dense, sparse)), disturbed(dense, sparse)


def _saved(frame: pd.DataFrame) -> dict[tuple[str, str], dict[int, float]]:
    return {(variant, mode): savings(frame, variant, mode) for variant in VARIANTS for mode in MODES}


def growth(frame: pd.DataFrame) -> Judgement:
    """Judge how the saving grows with the length, for both patterns and all modes of the heads."""
    exponents = [
        float(stats.linregress(np.log(list(own)), np.log(list(own.values()))).slope)
        for own in _saved(frame).values()
    ]
    grows = f"the saving grows as T^{min(exponents):.2f} to T^{max(exponents):.2f}"
    return Judgement(
        predicted="Causal, a token reads (T + 1) / 2 keys on average in dense attention, and about √T near "
        "and √T / 2 far keys with a stride of √T: the saving grows as √T.",
        measured=f"FLOPs of attention, from {min(LENGTHS):,} to {LONGEST:,} tokens: {grows}.",
        verdict=exactly(all(abs(exponent - EXPONENT) <= CLOSE for exponent in exponents)),
        reason=grows,
    )


def factor(frame: pd.DataFrame) -> Judgement:
    """Judge the saving at the longest sequence."""
    saved, (time, spoilt), root = _saved(frame), timed(frame), math.sqrt(LONGEST)
    factors = {name: own[LONGEST] / root for name, own in saved.items()}
    smallest, largest = min(factors, key=factors.__getitem__), max(factors, key=factors.__getitem__)
    dense, near, far = (LONGEST + 1) / 2, root, root / 2
    # the fixed pattern: the current block so far, and c summaries of each earlier block
    some = finished(frame, variant="sparse_fixed", seq_len=LONGEST)
    summaries = int(some.iloc[0]["variant_params"]["c"])
    fixed = dense / (near / 2 + summaries * far)
    listed = "; ".join(
        f"{variant} " + ", ".join(f"{units.digits(saved[variant, mode][LONGEST])} {mode}" for mode in MODES)
        for variant in VARIANTS
    )
    return Judgement(
        predicted=f"√T = {units.digits(root)} at {LONGEST:,}. The strided pattern saves "
        f"{units.ratio(dense / (near + far))} if each head reads both kinds (merged), "
        f"{units.ratio(dense / (near + far) * 2)} if each head reads one kind (split, interleaved). "
        f"The fixed pattern reads half of the near keys and {summaries} summaries for each far key: "
        f"{units.ratio(fixed)} and {units.ratio(2 * fixed)}.",
        measured=f"FLOPs of attention saved at {LONGEST:,}: {listed}. A whole step with one layer of width "
        f"256 is {time.text(units.ratio)} as fast with strided attention as with dense{spoilt}.",
        verdict=exactly(all(abs(own - 1) <= ABOUT for own in factors.values())),
        reason=f"the saving is {units.digits(factors[smallest])}·√T ({_name(smallest)}) to "
        f"{units.digits(factors[largest])}·√T ({_name(largest)}), of the FLOPs of attention only",
    )


def connection(frame: pd.DataFrame) -> Judgement:
    """Judge whether two layers connect all allowed pairs, in both patterns and all modes."""
    one, two = connected(frame, 1), connected(frame, 2)
    return Judgement(
        predicted="A far step followed by a near step connects any token to any later one.",
        measured=f"At {CONNECTED_AT:,} tokens one layer connects {units.share(one[0])} to "
        f"{units.share(one[1])} of the pairs, two connect "
        f"{' to '.join(dict.fromkeys(map(units.share, two)))}.",
        verdict=exactly(two[0] == 1),
        reason=f"two layers connect as little as {units.share(two[0])} of the pairs",
    )


def _name(pattern: tuple[str, str]) -> str:
    return f"{pattern[0]} {pattern[1]}"


PARTS = {
    "The saving grows as √T": growth,
    "It is a factor of about √T, 90 at 8,096 tokens": factor,
    "Two layers connect any two positions": connection,
}
