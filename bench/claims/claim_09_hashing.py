"""Reformer: shared queries and keys, the number of hash rounds, and the cost of a round.

With one bucket and a window as long as the sequence, hashing has no effect. The result is full attention with
shared queries and keys, by the paper's rules (keys of unit length; a token reads itself only if it has no
other key). The comparison with `dense` shows the effect of sharing, and the comparison with hashed cells the
effect of hashing.
"""

from __future__ import annotations

import math

import pandas as pd

from bench.claims.base import Finding, Missing, Verdict
from bench.claims.cells import Spread, by_replicate, difference, finished, has
from bench.claims.parts import Part, exponent, like, one_setting, points, share, together, unsure
from bench.report.data.power_law import TOLERANCE, fit

STATEMENT = (
    "Sharing queries and keys costs little perplexity; more hash rounds approach full attention; LSH costs "
    "T log T."
)
SOURCE = "Kitaev 2020, arXiv:2001.04451, §2, §5 and Table 1"

LITTLE = 0.02
"""Relative increase of the perplexity that counts as *little*."""


def judge(frame: pd.DataFrame) -> Finding:
    """Judge quality and distances from trained cells, and growth from planned cells."""
    hashed = finished(frame, variant="reformer")
    trained = has(hashed, "nll")
    knobs, lengths = trained["variant_params"], trained["seq_len"]
    whole = [p["n_buckets"] == 1 and p["chunk"] >= n for p, n in zip(knobs, lengths, strict=True)]
    full = trained[whole]
    if full.empty:
        raise Missing("variant=reformer n_buckets=1 chunk=seq_len: none was trained")
    rest, full = trained.drop(index=full.index), one_setting(full)
    return together([_sharing(frame, full), _rounds(rest, full), _growth(hashed)])


def _sharing(frame: pd.DataFrame, full: pd.DataFrame) -> Part:
    dense = has(finished(frame, variant="dense", **like(full)), "nll")
    loss = difference(full, dense, "nll")
    fewer = 1 - full["params"].median() / dense["params"].median()
    limit = math.log1p(LITTLE)
    verdict: Verdict = "does not hold here"
    but = f"it costs {share(math.expm1(loss.middle))} of perplexity"
    if loss.count > 1 and loss.high <= limit:
        verdict = "holds"
    elif loss.middle <= limit:
        verdict, but = "holds with a condition", f"it costs little, but {unsure(loss)}"
    return Part(
        predicted=f"A layer has three projections instead of four: {share(fewer)} fewer parameters.",
        measured="Perplexity of full attention with shared queries and keys, relative to dense: "
        f"{loss.text(lambda nats: f'{100 * math.expm1(nats):+.1f} %')}.",
        verdict=verdict,
        but=but,
    )


def _rounds(hashed: pd.DataFrame, full: pd.DataFrame) -> Part:
    if hashed.empty:
        raise Missing("variant=reformer: none that hashes was trained")
    hashed = has(finished(hashed, **like(full)), "softmax_error")
    count = hashed["variant_params"].map(lambda params: int(params["n_hashes"]))
    rounds = sorted(count.unique())
    if len(rounds) < 2:
        raise Missing("variant=reformer: needs a softmax_error at two numbers of n_hashes")
    each = [hashed[count == n] for n in rounds]
    errors = [Spread.of(by_replicate(own, "softmax_error")).middle for own in each]
    losses = [difference(own, full, "nll") for own in each]
    gain = difference(each[0], each[-1], "softmax_error")
    closer = errors == sorted(errors, reverse=True)
    sure = gain.count > 1 and gain.low > 0
    first, last = losses[0].middle, losses[-1].middle
    verdict: Verdict = "holds" if closer and sure and abs(last) <= abs(first) else "holds with a condition"
    if not closer:
        verdict, but = "does not hold here", "more rounds do not always come closer"
    elif not sure:
        but = f"more rounds come closer, but {unsure(gain)}"
    else:
        but = (
            "more rounds come closer in what layers compute, but in loss they go from "
            f"{points(first)} to {points(last)} against full attention"
        )
    return Part(
        predicted="Each round adds pairs and removes none.",
        measured=f"With {', '.join(map(str, rounds))} rounds, the relative error of a layer's outputs to "
        f"full attention with the same weights is {', '.join(map(share, errors))}, and the loss exceeds "
        f"that of full attention by {', '.join(points(one.middle) for one in losses)} nats "
        f"per token (with {rounds[-1]}: {losses[-1].text(points)}).",
        verdict=verdict,
        but=but,
    )


def _growth(hashed: pd.DataFrame) -> Part:
    growth, sizes = exponent(hashed, "flops_attention_step")
    claimed = fit(sizes, [size * math.log2(size) for size in sizes])
    assert claimed is not None  # the sizes have just been fitted
    return Part(
        predicted=f"From {sizes[0]:,} to {sizes[-1]:,} tokens T log T grows as T to the power "
        f"{claimed.exponent:.2f}.",
        measured=f"FLOPs of attention grow there as T to the power {growth.exponent:.2f}. They consist of "
        "hashing and of pairs; sorting, the source of T log T, has no FLOPs.",
        verdict="holds" if abs(growth.exponent - claimed.exponent) <= TOLERANCE else "does not hold here",
        but=f"FLOPs grow as T to the power {growth.exponent:.2f}: the number of buckets grows with T, "
        "and each token is projected to find its bucket",
    )
