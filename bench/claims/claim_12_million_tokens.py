"""A million tokens: the size of one tensor, and whether a training step of Reformer fits into one device."""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.cells import figure, finished
from bench.claims.parts import exactly
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
DEVICE = 16 * 10**9
"""Claimed bytes of the device."""
ABOUT = 0.05
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


def tensor(frame: pd.DataFrame) -> Judgement:
    """Judge the size of one tensor, as one more checkpointed layer stores it."""
    stored = tensor_bytes(frame)
    return Judgement(
        predicted=f"{MILLION:,} × {WIDTH} × {FLOAT} bytes = {_gigabytes(MILLION * WIDTH * FLOAT)}.",
        measured=f"One more checkpointed layer stores {_gigabytes(stored)} for a million tokens.",
        verdict=exactly(abs(stored / TENSOR - 1) <= ABOUT),
        reason=f"a million tokens are {_gigabytes(stored)}",
    )


def device(frame: pd.DataFrame) -> Judgement:
    """Judge reversible layers with a feed-forward layer in pieces, by prediction: no such step is run.

    Dense attention with a fused kernel is shown beside it: whether it fits as well is a part of the answer.
    """
    widths = (WIDTH, NARROW)
    plans = {
        (variant, width): planned(frame, variant, "reversible", width, LAYERS)
        for variant in ("reformer", "dense")
        for width in widths
    }
    peaks = {name: figure(cells, "peak_bytes") for name, cells in plans.items()}
    flops = {
        width: figure(plans["dense", width], "flops_algorithmic_step")
        / figure(plans["reformer", width], "flops_algorithmic_step")
        for width in widths
    }
    fits = {name: peak <= DEVICE for name, peak in peaks.items()}
    words = {
        name: f"{_gigabytes(peaks[name])} ({'fits' if fits[name] else 'does not fit'})" for name in peaks
    }
    streams = 2 * TOKENS * WIDTH * FLOAT
    listed = "; ".join(
        f"width {width}: reformer {words['reformer', width]}, dense {words['dense', width]} at "
        f"{units.ratio(flops[width])} its FLOPs"
        for width in widths
    )
    return Judgement(
        predicted="Two reversible streams of 2²⁰ tokens and their gradients are "
        f"{_gigabytes(2 * streams)} at width {WIDTH} and {_gigabytes(2 * streams * NARROW / WIDTH)} at width "
        f"{NARROW}, without any intermediate results.",
        measured=f"Predicted peak of a training step on 2²⁰ tokens, {LAYERS} reversible layers, feed-forward "
        f"in pieces, one sequence; no such step was run: {listed}.",
        verdict=exactly(fits["reformer", WIDTH]),
        reason=f"reformer does not fit at width {WIDTH}, and "
        f"{'fits' if fits['reformer', NARROW] else 'neither'} at width {NARROW}",
    )


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


PARTS = {
    "A million tokens of width 512 are 2 GB": tensor,
    "A device of 16 GB can train Reformer of this width on a million tokens": device,
}
