"""Memories that are longer at test than in training, on the same targets (`measure.longer`)."""

from __future__ import annotations

from functools import partial

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.cells import Spread, by_replicate
from bench.claims.losses import longer, trained
from bench.claims.parts import above, points, reason

STATEMENT = "A memory that is longer at test than in training lowers the loss."
SOURCE = (
    "Dai 2019, arXiv:1901.02860, §4.1 (384 positions in training and 1,600 at test on WikiText-103, 784 and "
    "3,800 on enwik8); the same is tried for the compressed memory of Rae 2019, arXiv:1911.05507"
)
HELPS = 0.002
"""Nats per token above which a longer memory *lowers* the loss. The weights and targets are the same, so the
difference has no noise of training; the margin excludes differences that nobody would notice."""


def memory(frame: pd.DataFrame, variant: str) -> Judgement:
    """Judge the longest memory at test against that of training."""
    rows = longer(trained(frame, variant), "longer_memory_positions", "nll_longer_memory")
    gains = rows["nll_longer_memory"].map(lambda nll: nll[0] - nll[-1])
    gain = Spread.plain(by_replicate(rows.assign(gain=gains), "gain"))
    lengths = [int(length) for length in rows.iloc[0]["longer_memory_positions"]]
    losses = [
        float(rows["nll_longer_memory"].map(lambda nll, at=at: nll[at]).median())
        for at in range(len(lengths))
    ]
    listed = ", ".join(f"{nll:.3f} with {length:,}" for length, nll in zip(lengths, losses, strict=True))
    verdict = above(gain, HELPS)
    return Judgement(
        predicted="None: more context can help, but the model never read so far back in training.",
        measured=f"Loss of {rows.iloc[0]['label']} by positions of memory at test, the first being that of "
        f"training: {listed} nats per token; the longest lowers it by {gain.text(points)}. More than "
        f"{HELPS:g} is lower.",
        verdict=verdict,
        reason=reason(verdict, f"a longer memory changes the loss by {points(-gain.middle)}", gain),
    )


PARTS = {
    "A longer memory at test lowers the loss of Transformer-XL": partial(memory, variant="transformer_xl"),
    "A longer memory at test lowers the loss of the Compressive Transformer": partial(
        memory, variant="compressive"
    ),
}
