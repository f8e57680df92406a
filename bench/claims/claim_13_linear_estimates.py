"""Linformer and Performer: the growth of their cost, and their error relative to softmax attention.

The error is relative to softmax attention with the layer's own projections, on the layer's inputs for text.
Before training, models of every size have equal weights, so the errors show the effect of the size. After
training, each model has its own weights, and training minimises the loss rather than the error. Here,
Linformer's mixtures are initialised with a scale of 1/√T rather than the 1/√k of Theorem 2, which is a
statement about the existence of mixtures rather than about random or learnt ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from bench.claims.base import Finding, Missing, Verdict
from bench.claims.cells import Spread, by_replicate, finished, has
from bench.claims.parts import Part, exponent, knob, one_setting, share, together
from bench.report.data.power_law import fit

STATEMENT = (
    "Linformer and Performer are linear in T and approximate softmax well (error by rank and by feature "
    "count)."
)
SOURCE = (
    "Wang 2020, arXiv:2006.04768, Theorem 2 and Figure 1; Choromanski 2020, arXiv:2009.14794, Lemma 2 and §3"
)

LINEAR = 0.02
"""Tolerance for the exponent of linear growth of FLOPs."""
WELL = 0.1
"""Maximum relative error of a *good* estimate."""
BADLY = 0.5
"""Relative error above which it is not an estimate."""
HARDLY = 0.9
"""Perplexity, relative to that without context, above which a model has hardly learnt to attend."""
ROOT, NEAR_ROOT = -0.5, 0.15
"""The exponent of an estimate's error in the number of features, and its tolerance."""


def judge(frame: pd.DataFrame) -> Finding:
    """Judge the growth from planned cells, and the errors from trained cells."""
    features = "The error of an unbiased estimate decreases as 1/√m with m features."
    return together(
        [
            _linear(frame),
            _estimate(frame, "performer", "n_features", "features", features, slope=ROOT),
            _estimate(frame, "linformer", "k", "mixed positions", _best_of_rank(frame), slope=None),
        ]
    )


def _linear(frame: pd.DataFrame) -> Part:
    measured, off = [], []
    for name in ("linformer", "performer"):
        growth, sizes = exponent(finished(frame, variant=name), "flops_attention_step")
        measured.append(
            f"{name} T to the power {growth.exponent:.3f} from {sizes[0]:,} to {sizes[-1]:,} tokens"
        )
        off.append(abs(growth.exponent - 1))
    return Part(
        predicted="FLOPs of attention grow as T.",
        measured=f"FLOPs of attention grow as: {', '.join(measured)}.",
        verdict="holds" if max(off) <= LINEAR else "does not hold here",
        but="FLOPs of attention do not grow linearly",
    )


def _estimate(
    frame: pd.DataFrame, name: str, size: str, unit: str, predicted: str, *, slope: float | None
) -> Part:
    rows = one_setting(has(finished(frame, variant=name), "softmax_error", "softmax_error_initial"))
    before, after = (_by_size(rows, key, size) for key in ("softmax_error_initial", "softmax_error"))
    perplexity, blind = (rows[key].median() for key in ("perplexity", "unigram_perplexity"))
    verdict, but = _judged(name, before, after, slope)
    if perplexity > HARDLY * blind:
        verdict = "holds with a condition" if verdict == "holds" else verdict
        but = ", ".join(filter(None, [but, f"the measured {name}s have hardly learnt to attend"]))
    return Part(
        predicted=predicted,
        measured=f"Relative error of a {name} with {', '.join(map(str, before.sizes))} {unit} to softmax "
        f"attention: {before.text()} before training, and {after.text()} after its own training, "
        f"at a perplexity of {perplexity:.3g} ({blind:.3g} without context).",
        verdict=verdict,
        but=but,
    )


@dataclass(frozen=True)
class Errors:
    """The errors of an estimate by its size."""

    sizes: list[int]
    spreads: list[Spread]
    exponent: float

    def text(self) -> str:
        """Return the errors as text: '40 %, 20 %, 10 % (exponent -0.50)'."""
        listed = ", ".join(share(spread.middle) for spread in self.spreads)
        return f"{listed} (exponent {self.exponent:.2f})"

    @property
    def falls(self) -> bool:
        """Whether the error decreases with every larger size."""
        middles = [spread.middle for spread in self.spreads]
        return middles == sorted(middles, reverse=True)

    @property
    def of_largest(self) -> Spread:
        """The error of the largest size."""
        return self.spreads[-1]


def _by_size(rows: pd.DataFrame, key: str, size: str) -> Errors:
    sizes = [int(n) for n in sorted(knob(rows, size).unique())]
    spreads = [Spread.of(by_replicate(rows[knob(rows, size) == n], key)) for n in sizes]
    line = fit(sizes, [spread.middle for spread in spreads])
    if line is None:
        variant = rows.iloc[0]["variant"]
        raise Missing(f"variant={variant}: needs {key} at three values of {size}")
    return Errors(sizes, spreads, line.exponent)


def _judged(name: str, before: Errors, after: Errors, slope: float | None) -> tuple[Verdict, str]:
    """Judge whether the error decreases as claimed with equal weights,
    and how small it is in trained models."""
    if not before.falls:
        return "does not hold here", f"{name}'s error does not decrease with its size, even before training"
    words = []
    if slope is not None and abs(before.exponent - slope) > NEAR_ROOT:
        words.append(f"{name}'s error does not decrease as 1/√m")
    if not after.falls:
        words.append(f"the error of trained {name}s does not decrease with their size")
    upper = after.of_largest.high if after.of_largest.count > 1 else after.of_largest.middle
    if upper > WELL:
        words.append(f"the error of the largest trained {name}s is {share(after.of_largest.middle)}")
    if not words:
        return "holds", ""
    near = min(before.of_largest.middle, after.of_largest.middle) <= BADLY
    return "holds with a condition" if near else "does not hold here", ", ".join(words)


def _best_of_rank(frame: pd.DataFrame) -> str:
    """Return the best possible error by rank, if there are attention statistics of a masked dense model."""
    try:
        rows = has(finished(frame, variant="dense", objective="mlm"), "attention_rank_error")
    except Missing:
        return "Weights of low rank are close to a matrix of low rank."
    errors = pd.DataFrame(rows["attention_rank_error"].tolist()).median()
    listed = ", ".join(f"{share(errors[k])} at rank {2**k}" for k in range(0, len(errors), 2))
    return f"Relative error of the best low-rank approximation of a masked dense model's weights: {listed}."
