"""Reformer: shared queries and keys, the number of hash rounds, and the cost of a round.

With one bucket and a window as long as the sequence, hashing has no effect. The result is full attention with
shared queries and keys, by the paper's rules (keys of unit length; a token reads itself only if it has no
other key). The comparison with `dense` shows the effect of sharing, and the comparison with hashed cells the
effect of hashing.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pandas as pd

from bench.claims.base import Judgement, Missing
from bench.claims.cells import Spread, by_replicate, difference, finished, has
from bench.claims.parts import (
    above,
    below,
    every,
    exactly,
    exponent,
    like,
    one_setting,
    points,
    reason,
    share,
)
from bench.report.data.power_law import fit

STATEMENT = (
    "Sharing queries and keys costs little perplexity; more hash rounds approach full attention; LSH costs "
    "T log T."
)
SOURCE = "Kitaev 2020, arXiv:2001.04451, §2, §5 and Table 1"

LITTLE = 0.02
"""Relative increase of the perplexity that counts as *little*."""


def _full(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the trained cells of full attention with shared queries and keys, and the other trained ones."""
    trained = has(finished(frame, variant="reformer"), "nll")
    knobs, lengths = trained["variant_params"], trained["seq_len"]
    whole = [p["n_buckets"] == 1 and p["chunk"] >= n for p, n in zip(knobs, lengths, strict=True)]
    full = trained[whole]
    if full.empty:
        raise Missing("variant=reformer n_buckets=1 chunk=seq_len, trained")
    return one_setting(full), trained.drop(index=full.index)


def sharing(frame: pd.DataFrame) -> Judgement:
    """Judge full attention with shared queries and keys against dense attention."""
    full, _ = _full(frame)
    dense = has(finished(frame, variant="dense", **like(full)), "nll")
    loss = difference(full, dense, "nll")
    fewer = 1 - full["params"].median() / dense["params"].median()
    verdict = below(loss, math.log1p(LITTLE))
    return Judgement(
        predicted=f"A layer has three projections instead of four: {share(fewer)} fewer parameters.",
        measured="Perplexity of full attention with shared queries and keys, relative to dense: "
        f"{loss.text(lambda nats: f'{100 * math.expm1(nats):+.1f} %')}. Up to {share(LITTLE)} is little.",
        verdict=verdict,
        reason=reason(verdict, f"it costs {share(math.expm1(loss.middle))} of perplexity", loss),
    )


def _by_rounds(frame: pd.DataFrame, name: str) -> dict[int, pd.DataFrame]:
    """Return the number of rounds → hashed cells with this figure, in the setting of full attention."""
    full, hashed = _full(frame)
    if hashed.empty:
        raise Missing("variant=reformer with several buckets, trained")
    hashed = has(finished(hashed, **like(full)), name)
    count = hashed["variant_params"].map(lambda params: int(params["n_hashes"]))
    rounds = sorted(count.unique())
    if len(rounds) < 2:
        raise Missing(f"variant=reformer: {name} at two numbers of n_hashes")
    return {n: hashed[count == n] for n in rounds}


def outputs(frame: pd.DataFrame) -> Judgement:
    """Judge whether every larger number of rounds comes closer to full attention with the same weights."""
    cells = _by_rounds(frame, "softmax_error")
    errors = [Spread.of(by_replicate(own, "softmax_error")).middle for own in cells.values()]
    gains = [difference(one, two, "softmax_error") for one, two in pairwise(cells.values())]
    verdict = every([above(gain) for gain in gains])
    return Judgement(
        predicted="Each round adds pairs and removes none.",
        measured=f"With {', '.join(map(str, cells))} rounds, the relative error of a layer's outputs to "
        f"full attention with the same weights is {', '.join(map(share, errors))}.",
        verdict=verdict,
        reason=reason(verdict, "more rounds do not always come closer", *gains),
    )


def loss(frame: pd.DataFrame) -> Judgement:
    """Judge whether the loss with most rounds is nearer to that of full attention than with fewest."""
    full, _ = _full(frame)
    cells = _by_rounds(frame, "nll")
    over = [difference(own, full, "nll") for own in cells.values()]
    first, last = (
        by_replicate(own, "nll") - by_replicate(full, "nll") for own in (cells[min(cells)], cells[max(cells)])
    )
    nearer = Spread.plain((first.abs() - last.abs()).dropna())
    verdict = above(nearer)
    return Judgement(
        predicted="A model whose layers compute nearly full attention models nearly as well.",
        measured=f"With {', '.join(map(str, cells))} rounds, the loss minus that of full attention is "
        f"{', '.join(points(one.middle) for one in over)} nats per token; with {max(cells)} it is nearer "
        f"than with {min(cells)} by {nearer.text(points)}.",
        verdict=verdict,
        reason=reason(
            verdict,
            f"the distance goes from {points(over[0].middle)} to {points(over[-1].middle)}",
            nearer,
        ),
    )


def growth(frame: pd.DataFrame) -> Judgement:
    """Judge the exponent of planned FLOPs: it must be nearer to that of T log T than to that of T."""
    found, sizes = exponent(finished(frame, variant="reformer"), "flops_attention_step")
    claimed = fit(sizes, [size * math.log2(size) for size in sizes])
    assert claimed is not None  # the sizes have just been fitted
    near = (claimed.exponent - 1) / 2
    return Judgement(
        predicted=f"From {sizes[0]:,} to {sizes[-1]:,} tokens T log T grows as T to the power "
        f"{claimed.exponent:.2f}.",
        measured=f"FLOPs of attention grow there as T to the power {found.exponent:.2f}. They consist of "
        "hashing and of pairs; sorting, the source of T log T, has no FLOPs.",
        verdict=exactly(abs(found.exponent - claimed.exponent) < near),
        reason=f"FLOPs grow as T to the power {found.exponent:.2f}",
    )


PARTS = {
    "Sharing queries and keys costs little perplexity": sharing,
    "More hash rounds approach the outputs of full attention": outputs,
    "More hash rounds approach the loss of full attention": loss,
    "LSH costs T log T": growth,
}
