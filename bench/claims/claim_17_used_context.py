"""The context that a model may read, and the context that it uses after training.

The receptive field is that of the layers' attention masks (`reach`). The used context is the shortest history
beyond which the loss on the same targets does not improve (`effective_context`, with its interval over
targets).
"""

from __future__ import annotations

from functools import partial

import pandas as pd

from bench.claims.base import Judgement, Verdict
from bench.claims.cells import Spread, by_replicate, finished, has
from bench.claims.parts import above, below, decided_by, one_setting

STATEMENT = "Models use much less context than they may read."
SOURCE = (
    "Khandelwal 2018, arXiv:1805.04623, abstract (language models with LSTMs use about 200 tokens, and "
    "distinguish the nearest 50); Sun 2021, arXiv:2109.09115, abstract (of 8,192 tokens, those beyond 2,048 "
    "improve few predictions)"
)
MUCH_LESS = 0.5
"""Share of the receptive field up to which the used context is *much less*. Histories are powers of two, so
it is the next size below all of it."""
FIGURES = ("effective_context", "effective_context_low", "effective_context_high", "reach")


def used(frame: pd.DataFrame, variant: str) -> Judgement:
    """Judge the upper end of the used context; its lower end contradicts the claim."""
    rows = finished(frame, variant=variant, objective="clm", measure="standard")
    rows = one_setting(has(rows, *FIGURES))
    field = rows["reach"] + 1  # the token that is read last is also one of the history
    low, middle, high = (
        Spread.of(by_replicate(rows.assign(share=rows[name] / field), "share"))
        for name in ("effective_context_low", "effective_context", "effective_context_high")
    )
    verdict: Verdict = below(high, MUCH_LESS)
    if verdict == "contradicted":  # of the upper end; the claim is only if the lower end is too large
        verdict = "not decided here"
    if above(low, MUCH_LESS) == "shown":
        verdict = "contradicted"
    median = {name: rows[name].median() for name in FIGURES}
    words = {
        "shown": "",
        "contradicted": f"it uses {median['effective_context']:,.0f} of {median['reach'] + 1:,.0f} tokens",
        "not decided here": f"{decided_by(high)}, or more targets: the interval of the used context is "
        f"{median['effective_context_low']:,.0f} to {median['effective_context_high']:,.0f} tokens",
    }[verdict]
    first = rows.iloc[0]
    return Judgement(
        predicted="None: the masks say what a model may read, not what helps it.",
        measured=f"{first['label']} of {first['depth']} layers may read {median['reach'] + 1:,.0f} tokens; "
        f"after {first['tokens_trained']:,.0f} tokens of training its loss does not improve by more than "
        f"0.01 nats per token beyond {median['effective_context']:,.0f} "
        f"({median['effective_context_low']:,.0f} to {median['effective_context_high']:,.0f}), "
        f"{middle.text(_share)} of the field. Up to {_share(MUCH_LESS)} is much less.",
        verdict=verdict,
        reason=words,
    )


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


PARTS = {
    "Dense attention uses at most half of the context that it may read": partial(used, variant="dense"),
    "Stacked windows use at most half of their receptive field": partial(used, variant="longformer"),
}
