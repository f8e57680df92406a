"""Memory of a layer's stored scores: the difference to a layer that does not store them."""

from __future__ import annotations

import math

import pandas as pd

from bench.claims.base import Finding, Verdict
from bench.claims.cells import figure, finished, large
from bench.report.text import units

STATEMENT = (
    "12 heads × 512² scores are about 3 million floats, 12 MiB a layer; at 8,192 tokens 3 GiB a layer, and "
    "36 GiB in 12 layers if they are stored. (And the memory of a fused kernel.)"
)
SOURCE = (
    "As stated in popular accounts, at the sizes of BERT-base (Devlin 2018, arXiv:1810.04805, §3); what a "
    "fused kernel stores is Dao 2022, arXiv:2205.14135, §3.1"
)
CLAIMED = {512: 12 * 2.0**20, 8192: 3 * 2.0**30}
"""Tokens → claimed bytes per layer."""
CLAIMED_IN_ALL = 36 * 2.0**30
LAYERS = 12
ABOUT = 0.05
"""Relative tolerance of *about*."""
FLOAT = 4
"""Bytes of a float32."""


def stored(frame: pd.DataFrame, seq_len: int, impl: str, depths: tuple[int, int], measure: str) -> float:
    """Return the bytes that the forward pass of one more layer stores for the backward pass."""
    low, high = (
        figure(
            finished(
                frame,
                variant="dense",
                objective="mlm",
                seq_len=seq_len,
                depth=depth,
                d_model=768,
                heads=12,
                batch_size=1,
                measure=measure,
                knobs={"impl": impl},
            ),
            "activation_bytes",
        )
        for depth in depths
    )
    return (high - low) / (depths[1] - depths[0])


def judge(frame: pd.DataFrame) -> Finding:
    """Compare the same network with stored scores and with the fused kernel; the difference is the scores."""
    plans = {
        t: {impl: stored(frame, t, impl, (1, LAYERS), "plan") for impl in ("naive", "sdpa")} for t in CLAIMED
    }
    more = {t: layer["naive"] - layer["sdpa"] for t, layer in plans.items()}
    shortest, longest = min(CLAIMED), max(CLAIMED)
    run = stored(frame, shortest, "naive", (1, 2), "quick") - stored(frame, shortest, "sdpa", (1, 2), "quick")
    at = {"variant": "dense", "objective": "mlm", "seq_len": longest, "depth": LAYERS, "measure": "plan"}
    naive, sdpa = (finished(frame, **at, d_model=768, knobs={"impl": impl}) for impl in ("naive", "sdpa"))
    in_all = figure(naive, "activation_bytes") - figure(sdpa, "activation_bytes")
    heads = figure(naive, "heads")
    scores = {t: heads * t * t for t in CLAIMED}
    holds = all(
        abs(measured / claimed - 1) <= ABOUT for measured, claimed in [(more[t], CLAIMED[t]) for t in CLAIMED]
    ) and (abs(in_all / CLAIMED_IN_ALL - 1) <= ABOUT and abs(run / CLAIMED[shortest] - 1) <= ABOUT)
    rest = more[longest] - (scores[longest] - heads * longest) * FLOAT
    mask = longest**2  # naive stores its mask, one byte per pair
    with_mask = f" (and a mask, {units.size(mask)} at {longest:,})" if abs(rest / mask - 1) < ABOUT else ""
    whole = [plans[t]["sdpa"] for t in (shortest, longest)]
    slope = math.log(whole[1] / whole[0]) / math.log(longest / shortest)
    verdict: Verdict = "holds" if holds else "does not hold here"
    instead = {t: heads * t * FLOAT for t in CLAIMED}
    sizes = [f"{large(count)} floats, {units.size(count * FLOAT)}, at {t:,}" for t, count in scores.items()]
    return Finding(
        predicted=f"H·T² scores of {FLOAT} bytes: {' and '.join(sizes)} a layer; in {LAYERS} layers "
        f"{units.size(LAYERS * scores[longest] * FLOAT)}. A fused kernel stores their log-sum-exps "
        f"instead, H·T: {' and '.join(units.size(size) for size in instead.values())} a layer, and "
        "recomputes the scores in the backward pass",
        measured=f"A layer that stores its scores{with_mask} stores more than the fused one: at {shortest:,} "
        f"tokens {units.size(more[shortest])} by prediction and {units.size(run)} by measurement, "
        f"at {longest:,} {units.size(more[longest])} by prediction; {LAYERS} layers {units.size(in_all)}. "
        f"With the fused kernel a whole block stores {units.size(whole[0])} and "
        f"{units.size(whole[1])}, which grows as T^{slope:.2f}; the peak of a step of {LAYERS} layers at "
        f"{longest:,} is {units.size(figure(sdpa, 'peak_bytes'))} instead of "
        f"{units.size(figure(naive, 'peak_bytes'))}",
        verdict=verdict,
    )
