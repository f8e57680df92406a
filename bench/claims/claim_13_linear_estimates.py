"""Linformer and Performer: how their cost grows, and how far they are from the attention they estimate.

The distance is taken in trained models, on the inputs that a layer gets there, to softmax attention with the
layer's own projections. Training asks a layer for a low loss and not to stay close.
"""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Finding, Missing, Verdict
from bench.claims.cells import Spread, by_replicate, finished, has
from bench.claims.parts import Part, exponent, knob, one_setting, share, together
from bench.report.scaling import fit

STATEMENT = (
    "Linformer and Performer are linear in T and approximate softmax well (error by rank and by feature "
    "count)."
)
SOURCE = (
    "Wang 2020, arXiv:2006.04768, Theorem 2 and Figure 1; Choromanski 2020, arXiv:2009.14794, Lemma 2 and §3"
)

LINEAR = 0.02
"""How far from 1 a linear exponent of FLOPs may be."""
WELL = 0.1
"""Distance, over the size of what is estimated, up to which it is estimated well."""
BADLY = 0.5
"""Distance beyond which it is no estimate."""
HARDLY = 0.9
"""Perplexity, over that without any context, above which a model has hardly learnt to attend."""
ROOT, NEAR_ROOT = -0.5, 0.15
"""The exponent of an estimate's error in the number of features, and how far from it one may be."""


def judge(frame: pd.DataFrame) -> Finding:
    """Growth from planned cells, errors from trained ones."""
    features = "The error of an unbiased estimate falls as 1/√m, m features."
    return together(
        [
            _linear(frame),
            _estimate(frame, "performer", "n_features", "features", features, slope=ROOT),
            _estimate(frame, "linformer", "k", "mixed positions", _best_of_rank(frame), slope=None),
        ]
    )


def _linear(frame: pd.DataFrame) -> Part:
    said, off = [], []
    for name in ("linformer", "performer"):
        found, sizes = exponent(finished(frame, variant=name), "flops_attention_step")
        said.append(f"{name} T to the power {found.exponent:.3f} from {sizes[0]:,} to {sizes[-1]:,} tokens")
        off.append(abs(found.exponent - 1))
    return Part(
        predicted="FLOPs of attention grow as T.",
        measured=f"FLOPs of attention grow as: {', '.join(said)}.",
        verdict="holds" if max(off) <= LINEAR else "does not hold here",
        but="FLOPs of attention do not grow linearly",
    )


def _estimate(
    frame: pd.DataFrame, name: str, size: str, what: str, predicted: str, *, slope: float | None
) -> Part:
    rows = one_setting(has(finished(frame, variant=name), "softmax_error"))
    sizes = sorted(knob(rows, size).unique())
    each = [Spread.of(by_replicate(rows[knob(rows, size) == n], "softmax_error")) for n in sizes]
    errors = [found.middle for found in each]
    line = fit(sizes, errors)
    if line is None:
        raise Missing(f"variant={name}: needs a softmax_error at three values of {size}")
    perplexity, blind = (rows[key].median() for key in ("perplexity", "unigram_perplexity"))
    learnt = perplexity <= HARDLY * blind
    verdict, but = _judged(name, errors, each[-1], None if slope is None else line.exponent - slope, learnt)
    pairs = zip(sizes, errors, strict=True)
    listed = ", ".join(f"{share(error)} with {n}" for n, error in pairs)
    return Part(
        predicted=predicted,
        measured=f"Outputs of a trained {name} are off softmax attention by, of its size, {listed} {what} "
        f"(as these to the power {line.exponent:.2f}; with most: {each[-1].said(share)}); perplexity {perplexity:.3g}, "
        f"{blind:.3g} without context.",
        verdict=verdict,
        but=but,
    )


def _judged(
    name: str, errors: list[float], last: Spread, off_slope: float | None, learnt: bool
) -> tuple[Verdict, str]:
    """Whether the error falls, as it should, and to where; `last` is that of the largest size."""
    falls = errors == sorted(errors, reverse=True)
    most = last.high if last.count > 1 else last.middle
    words = []
    if not falls:
        words.append(f"{name} does not come closer with more of them")
    elif off_slope is not None and abs(off_slope) > NEAR_ROOT:
        words.append(f"{name}'s error does not fall as a root")
    if most > WELL:
        words.append(f"{name} is off by {share(last.middle)} with most of them")
    if not learnt:
        words.append(f"the {name}s looked at have hardly learnt to attend")
    if not words:
        return "holds", ""
    return "does not hold here" if not falls or last.middle > BADLY else "holds with a condition", ", ".join(
        words
    )


def _best_of_rank(frame: pd.DataFrame) -> str:
    """What any matrix of a rank could do, where the weights of a masked dense model were looked at."""
    try:
        rows = has(finished(frame, variant="dense", objective="mlm"), "attention_rank_error")
    except Missing:
        return "Weights of low rank have a near matrix of low rank."
    errors = pd.DataFrame(rows["attention_rank_error"].tolist()).median()
    listed = ", ".join(f"{share(errors[k])} at rank {2**k}" for k in range(0, len(errors), 2))
    return f"The nearest matrix to a masked dense model's weights is off by {listed}."
