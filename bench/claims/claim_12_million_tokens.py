"""A million tokens: the size of one tensor, and whether a training step of Reformer fits into one device."""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Finding, Verdict
from bench.claims.cells import figure, finished
from bench.report.text import units

STATEMENT = (
    "A million tokens of width 512 are 2 GB, and one device of 16 GB can train Reformer on a million tokens."
)
SOURCE = (
    "Kitaev 2020, arXiv:2001.04451, §1 (memory of activations), and its authors' announcement (Google AI "
    "Blog, 16 January 2020: 'up to 1 million words … using only 16GB of memory')"
)
TOKENS = 2**20
MILLION = 10**6
WIDTH, NARROW = 512, 256
LAYERS = 12
TENSOR = 2e9
"""Claimed bytes of one tensor."""
DEVICE = 16 * 2**30
"""Bytes of a device that is marketed as 16 GB."""
ABOUT = 0.1
"""Relative tolerance of *about*."""
FLOAT = 4
"""Bytes of a float32."""


def planned(frame: pd.DataFrame, variant: str, activations: str, width: int, depth: int) -> pd.DataFrame:
    """Return the planned cells of one sequence of a million tokens."""
    return finished(
        frame,
        variant=variant,
        activations=activations,
        seq_len=TOKENS,
        d_model=width,
        batch_size=1,
        depth=depth,
        measure="plan",
        dtype="float32",
    )


def tensor_bytes(frame: pd.DataFrame) -> float:
    """Return the bytes that one more checkpointed layer stores (its input) for a million tokens."""
    one, two = (
        figure(planned(frame, "dense", "checkpoint", WIDTH, depth), "activation_bytes") for depth in (1, 2)
    )
    return (two - one) * MILLION / TOKENS


def judge(frame: pd.DataFrame) -> Finding:
    """Judge reversible layers with a feed-forward layer in pieces, by prediction: no such step is run."""
    tensor = tensor_bytes(frame)
    plans = {
        (variant, width): planned(frame, variant, "reversible", width, LAYERS)
        for variant in ("reformer", "dense")
        for width in (WIDTH, NARROW)
    }
    peaks = {name: figure(cells, "peak_bytes") for name, cells in plans.items()}
    fits = {width: peaks["reformer", width] <= DEVICE for width in (WIDTH, NARROW)}
    flops = {
        width: figure(plans["dense", width], "flops_algorithmic_step")
        / figure(plans["reformer", width], "flops_algorithmic_step")
        for width in (WIDTH, NARROW)
    }
    verdict: Verdict = "does not hold here"
    if abs(tensor / TENSOR - 1) > ABOUT:
        condition = f"a million tokens are {_gigabytes(tensor)}"
    elif fits[WIDTH]:
        verdict, condition = "holds", "as predicted; no such step was run"
    elif fits[NARROW]:
        verdict = "holds with a condition"
        condition = (
            f"at width {NARROW}, one sequence, not at width {WIDTH}; as predicted, no such step was run"
        )
    else:
        condition = f"it is predicted to fit neither at width {WIDTH} nor at width {NARROW}"
    alike = peaks["dense", NARROW] <= peaks["reformer", NARROW]
    doing = (
        ". Dense attention with a fused kernel fits equally well: hashing saves FLOPs only" if alike else ""
    )
    streams = 2 * TOKENS * WIDTH * FLOAT
    return Finding(
        predicted=f"{MILLION:,} × {WIDTH} × {FLOAT} bytes = {_gigabytes(MILLION * WIDTH * FLOAT)}. Two "
        f"reversible streams of 2²⁰ tokens and their gradients are {units.size(2 * streams)} at width "
        f"{WIDTH} and {units.size(2 * streams * NARROW / WIDTH)} at width {NARROW}, without any "
        "intermediate results",
        measured=f"One more checkpointed layer stores {_gigabytes(tensor)} for a million tokens. Predicted "
        f"peak of a training step on 2²⁰ tokens, {LAYERS} reversible layers, feed-forward in pieces: "
        + "; ".join(
            f"width {width}: Reformer {units.size(peaks['reformer', width])}, dense "
            f"{units.size(peaks['dense', width])} at {units.ratio(flops[width])} its FLOPs"
            for width in (WIDTH, NARROW)
        )
        + doing,
        verdict=verdict,
        condition=condition,
    )


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"
