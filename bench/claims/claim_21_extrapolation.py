"""The loss on sequences that are longer than those of training, by position scheme (`measure.longer`).

Rotary positions are those of `dense`, relative ones those of `transformer_xl` (the four-term score of Dai
2019, §3.3). Its segments and memory bound the distances, as in its training; that is a part of the scheme.
"""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement, Missing, Verdict
from bench.claims.cells import Spread, by_replicate
from bench.claims.losses import longer, trained
from bench.claims.parts import above, below, points, reason

STATEMENT = (
    "Relative positions extrapolate to longer sequences than those of training; rotary positions do not."
)
SOURCE = (
    "Press 2021, arXiv:2108.12409, §2 and Figure 1 (rotary against the relative bias of T5 and ALiBi); "
    "relative positions with a memory: Dai 2019, arXiv:1901.02860, §3.3"
)
NONE = 0.02
"""Nats per token by which the loss may rise and still *extrapolate*, and must rise to *not extrapolate*: two
per cent of perplexity. It is a margin against the noise of targets, which are the same at each length."""
FACTOR = 2
"""Length of the sequences at test, as a multiple of those in training; longer ones are shown beside it."""


def _rise(frame: pd.DataFrame, variant: str) -> tuple[Spread, str]:
    """Return by how much the loss rises at `FACTOR` times the trained length, and what was measured."""
    rows = longer(trained(frame, variant), "longer_lengths", "nll_longer")
    lengths = [int(length) for length in rows.iloc[0]["longer_lengths"]]
    if FACTOR * lengths[0] not in lengths:
        raise Missing(f"variant={variant}: nll_longer at {FACTOR * lengths[0]:,} tokens")
    at = lengths.index(FACTOR * lengths[0])
    rises = {
        length: Spread.plain(
            by_replicate(rows.assign(rise=[nll[k] - nll[0] for nll in rows["nll_longer"]]), "rise")
        )
        for k, length in enumerate(lengths)
        if k
    }
    listed = "; ".join(f"{rise.text(points)} at {length:,}" for length, rise in rises.items())
    words = (
        f"Loss of {rows.iloc[0]['label']} at longer sequences minus that at {lengths[0]:,} tokens, as in "
        f"training, on the same targets: {listed} nats per token. Up to {NONE:g} at {lengths[at]:,} tokens, "
        "it extrapolates."
    )
    return rises[lengths[at]], words


def rotary(frame: pd.DataFrame) -> Judgement:
    """Judge whether the loss of dense attention with rotary positions rises."""
    rise, words = _rise(frame, "dense")
    verdict = above(rise, NONE)
    return Judgement(
        predicted="Rotations by distances that training never had make scores that it never had.",
        measured=words,
        verdict=verdict,
        reason=reason(verdict, f"rotary positions lose {points(rise.middle)} nats per token", rise),
    )


def relative(frame: pd.DataFrame) -> Judgement:
    """Judge whether the loss with relative positions does not rise."""
    rise, words = _rise(frame, "transformer_xl")
    verdict: Verdict = below(rise, NONE)
    return Judgement(
        predicted="A segment reads itself and its memory, so no distance is longer than in training.",
        measured=words,
        verdict=verdict,
        reason=reason(verdict, f"relative positions lose {points(rise.middle)} nats per token", rise),
    )


PARTS = {
    "The loss with rotary positions rises beyond the trained length": rotary,
    "The loss with relative positions does not": relative,
}
