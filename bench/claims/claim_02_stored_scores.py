"""Memory of a layer's stored scores: the difference to a layer that does not store them."""

from __future__ import annotations

import math

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.cells import figure, finished, large
from bench.claims.parts import exactly
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


def more(frame: pd.DataFrame, seq_len: int, depths: tuple[int, int], measure: str) -> float:
    """Return the bytes that a layer with stored scores stores beyond those of the fused kernel."""
    naive, sdpa = (stored(frame, seq_len, impl, depths, measure) for impl in ("naive", "sdpa"))
    return naive - sdpa


def deepest(frame: pd.DataFrame, impl: str) -> pd.DataFrame:
    """Return the planned cells of the whole network at the longest sequence."""
    at = {"variant": "dense", "objective": "mlm", "seq_len": max(CLAIMED), "depth": LAYERS, "measure": "plan"}
    return finished(frame, **at, d_model=768, knobs={"impl": impl})


def layer(frame: pd.DataFrame) -> Judgement:
    """Compare the same network with stored scores and with the fused kernel; the difference is the scores."""
    shortest, longest = min(CLAIMED), max(CLAIMED)
    planned = {t: more(frame, t, (1, LAYERS), "plan") for t in CLAIMED}
    run = more(frame, shortest, (1, 2), "quick")
    near = [abs(planned[t] / claimed - 1) <= ABOUT for t, claimed in CLAIMED.items()]
    near.append(abs(run / CLAIMED[shortest] - 1) <= ABOUT)
    heads = figure(deepest(frame, "naive"), "heads")
    counts = {t: heads * t * t for t in CLAIMED}
    sizes = [f"{large(count)} floats, {units.size(count * FLOAT)}, at {t:,}" for t, count in counts.items()]
    rest = planned[longest] - (counts[longest] - heads * longest) * FLOAT
    mask = longest**2  # naive stores its mask, one byte per pair
    with_mask = f" (and a mask, {units.size(mask)} at {longest:,})" if abs(rest / mask - 1) < ABOUT else ""
    return Judgement(
        predicted=f"H·T² scores of {FLOAT} bytes: {' and '.join(sizes)} a layer.",
        measured=f"A layer that stores its scores{with_mask} stores more than the fused one: at {shortest:,} "
        f"tokens {units.size(planned[shortest])} by prediction and {units.size(run)} by measurement, "
        f"at {longest:,} {units.size(planned[longest])} by prediction.",
        verdict=exactly(all(near)),
        reason=f"it stores {units.size(planned[shortest])} and {units.size(planned[longest])}",
    )


def network(frame: pd.DataFrame) -> Judgement:
    """Compare the whole network in the same way, and show what the fused kernel needs."""
    naive, sdpa = (deepest(frame, impl) for impl in ("naive", "sdpa"))
    in_all = figure(naive, "activation_bytes") - figure(sdpa, "activation_bytes")
    heads, shortest, longest = figure(naive, "heads"), min(CLAIMED), max(CLAIMED)
    whole = [stored(frame, t, "sdpa", (1, LAYERS), "plan") for t in (shortest, longest)]
    slope = math.log(whole[1] / whole[0]) / math.log(longest / shortest)
    instead = " and ".join(units.size(heads * t * FLOAT) for t in (shortest, longest))
    return Judgement(
        predicted=f"In {LAYERS} layers {units.size(LAYERS * heads * longest**2 * FLOAT)}. A fused kernel "
        f"stores log-sum-exps instead, H·T: {instead} a layer, and recomputes the scores in the backward "
        "pass.",
        measured=f"{LAYERS} layers store {units.size(in_all)} more by prediction. With the fused kernel a "
        f"whole block stores {units.size(whole[0])} at {shortest:,} tokens and {units.size(whole[1])} at "
        f"{longest:,}, which grows as T^{slope:.2f}; the peak of a step of {LAYERS} layers at "
        f"{longest:,} is {units.size(figure(sdpa, 'peak_bytes'))} instead of "
        f"{units.size(figure(naive, 'peak_bytes'))}.",
        verdict=exactly(abs(in_all / CLAIMED_IN_ALL - 1) <= ABOUT),
        reason=f"{LAYERS} layers store {units.size(in_all)}",
    )


PARTS = {
    "A layer's scores take 12 MiB at 512 tokens and 3 GiB at 8,192": layer,
    "In 12 layers they take 36 GiB at 8,192 tokens": network,
}
