"""Attention on the first tokens of a sequence, and windows that keep them.

The paper evaluates models that were trained with dense attention, with a window of keys at test. That is not
expressed by the knobs of a variant here: a window holds in training too. So the second part compares models
that were trained with windows that keep the first tokens (`streaming_llm`), with windows alone, and with
dense attention. A model that learns with a window may learn to do without a sink.
"""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.cells import Spread, by_replicate, finished, has
from bench.claims.losses import knobs_that, near, trained
from bench.claims.parts import above, one_setting, reason, share
from bench.report.text import units

STATEMENT = "Attention falls on the first tokens whatever they mean; a window that keeps them loses nothing."
SOURCE = (
    "Xiao 2023, arXiv:2309.17453, abstract, §3.1 and Figure 2 (first tokens), §3.2 (a window that keeps them)"
)
MANY_TIMES = 4.0
"""Times the share of uniform weights above which attention *falls on* the first tokens."""
SINKS = 4
"""Number of first tokens that the paper keeps; `sink_mass` is of as many."""


def sinks(frame: pd.DataFrame) -> Judgement:
    """Judge the attention of dense models on the first tokens of held-out windows, which begin anywhere."""
    rows = has(finished(frame, variant="dense", objective="clm"), "sink_mass", "sink_mass_uniform")
    rows = one_setting(rows[rows["seq_len"] == rows["seq_len"].max()])
    mass, alike = (Spread.of(by_replicate(rows, name)) for name in ("sink_mass", "sink_mass_uniform"))
    times = Spread.of(by_replicate(rows.assign(times=rows["sink_mass"] / rows["sink_mass_uniform"]), "times"))
    verdict = above(times, MANY_TIMES)
    return Judgement(
        predicted=f"With uniform weights the first {SINKS} tokens would have {share(alike.middle)} of a "
        "row's mass. Windows of held-out text begin anywhere, so their first tokens have no meaning of "
        "their own.",
        measured=f"They have {mass.text(share)}, {times.text(units.ratio)} as much, in rows of more than "
        f"half of {rows.iloc[0]['seq_len']:,} tokens; the mean over all layers and heads, after "
        f"{rows.iloc[0]['tokens_trained']:,.0f} tokens of training. More than {units.ratio(MANY_TIMES)} is "
        "a sink.",
        verdict=verdict,
        reason=reason(verdict, f"they have {units.ratio(times.middle)} the share of uniform weights", times),
    )


def kept(frame: pd.DataFrame) -> Judgement:
    """Judge windows that keep the first tokens against dense attention, where windows alone lose to it."""
    rows = knobs_that(
        trained(frame, "streaming_llm"), lambda params: params["sinks"] == SINKS, f"sinks={SINKS}"
    )
    rows = one_setting(rows)
    window = rows.iloc[0]["variant_params"]["window"]
    alone = knobs_that(
        trained(frame, "longformer"),
        lambda params: list(params["window"]) == [window] and not params["global_tokens"],
        f"window={window} global_tokens=0",
    )
    return near(
        rows,
        trained(frame, "dense"),
        alone,
        (f"windows with the first {SINKS} tokens", "dense attention", "windows alone"),
        "Weights sum to one, so a row that needs no key puts its mass somewhere; without the first tokens it "
        "spoils the output.",
    )


PARTS = {
    "Attention falls on the first tokens": sinks,
    "A window that keeps the first tokens is near dense attention, a window alone is not": kept,
}
