"""Multiplications of a layer's score product, counted in the dispatched matrix products."""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.cells import figure, finished, large
from bench.claims.parts import exactly

STATEMENT = (
    "The score product of one layer costs about 200 million multiplies at 512 tokens of 768 channels, and "
    "about 50 billion at 8,192."
)
SOURCE = (
    "As stated in popular accounts, at the sizes of BERT-base (Devlin 2018, arXiv:1810.04805, §3); it "
    "follows from the T²·C of Vaswani 2017, arXiv:1706.03762, Table 1"
)
CLAIMED = {512: 200e6, 8192: 50e9}
"""Tokens → claimed multiplications."""
WIDTH = 768
ABOUT = 0.05
"""Relative tolerance of *about*."""
SHARE_OF_STEP = 1 / 3 / 2 / 2
"""Multiplications of the score product ÷ FLOPs of a step's attention: the forward pass is a third of the
step, the scores are one of two equal products, and each multiplication has an addition."""


def multiplies(frame: pd.DataFrame, seq_len: int, objective: str, impl: str) -> float:
    """Return the dispatched multiplications of the scores of one layer."""
    cells = finished(
        frame,
        variant="dense",
        objective=objective,
        seq_len=seq_len,
        depth=1,
        d_model=WIDTH,
        batch_size=1,
        measure="plan",
        knobs={"impl": impl},
    )
    return figure(cells, "flops_attention_step") * figure(cells, "cost_ratio") * SHARE_OF_STEP


def scores(frame: pd.DataFrame) -> Judgement:
    """Judge full attention as in BERT; causal attention is reported in addition."""
    full = {t: multiplies(frame, t, "mlm", "naive") for t in CLAIMED}
    masked = {t: multiplies(frame, t, "clm", "naive") for t in CLAIMED}
    skipped = {t: multiplies(frame, t, "clm", "sdpa") for t in CLAIMED}

    def listed(counts: dict[int, float]) -> str:
        return " and ".join(f"{large(count)} at {t:,}" for t, count in counts.items())

    return Judgement(
        predicted=f"T²·C: {listed({t: float(t * t * WIDTH) for t in CLAIMED})}.",
        measured=f"Dispatched, bidirectional: {listed(full)}. Causal: {listed(masked)} by a layer that masks "
        f"its scores, {listed(skipped)} by the kernel that skips masked blocks. The product with the values "
        "costs the same again.",
        verdict=exactly(all(abs(full[t] / claimed - 1) <= ABOUT for t, claimed in CLAIMED.items())),
        reason=f"a layer multiplies {listed(full)}",
    )


PARTS = {"If all scores are computed: 200 million multiplies at 512 tokens, 50 billion at 8,192": scores}
