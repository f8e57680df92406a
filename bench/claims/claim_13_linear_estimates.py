"""Linformer and Performer: the growth of their cost, and their error relative to softmax attention.

The error is relative to softmax attention with the layer's own projections, on the layer's inputs for text.
Before training, models of every size have equal weights, so the errors show the effect of the size. After
training, each model has its own weights, and training minimises the loss rather than the error. Here,
Linformer's mixtures are initialised with a scale of 1/√T rather than the 1/√k of Theorem 2, which is a
statement about the existence of mixtures rather than about random or learnt ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pandas as pd

from bench.claims.base import Judgement, Missing, Verdict
from bench.claims.cells import Spread, by_replicate, finished, has
from bench.claims.parts import below, exactly, exponent, knob, one_setting, reason, share
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
HARDLY = 0.9
"""Perplexity, relative to that without context, above which a model has hardly learnt to attend."""
ROOT, NEAR_ROOT = -0.5, 0.15
"""The exponent of an estimate's error in the number of features, and its tolerance."""


def linear(frame: pd.DataFrame) -> Judgement:
    """Judge the growth of planned FLOPs."""
    measured, off = [], []
    for name in ("linformer", "performer"):
        growth, sizes = exponent(finished(frame, variant=name), "flops_attention_step")
        measured.append(
            f"{name} T to the power {growth.exponent:.3f} from {sizes[0]:,} to {sizes[-1]:,} tokens"
        )
        off.append(abs(growth.exponent - 1))
    return Judgement(
        predicted="FLOPs of attention grow as T.",
        measured=f"FLOPs of attention grow as: {', '.join(measured)}.",
        verdict=exactly(max(off) <= LINEAR),
        reason="FLOPs of attention do not grow linearly",
    )


def _trained(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the trained cells of one setting; independent or redrawn features are those of claim 22."""
    rows = has(finished(frame, variant=name), "softmax_error", "softmax_error_initial")
    usual = [own.get("orthogonal", True) and not own.get("redraw", 0) for own in rows["variant_params"]]
    if not any(usual):
        raise Missing(f"variant={name} orthogonal=true redraw=0: no such cell")
    return one_setting(rows[usual])


def features(frame: pd.DataFrame) -> Judgement:
    """Judge how the error of Performers with equal weights decreases with the number of features."""
    errors = _by_size(_trained(frame, "performer"), "softmax_error_initial", "n_features")
    return Judgement(
        predicted="The error of an unbiased estimate decreases as 1/√m with m features.",
        measured=f"Relative error before training with {', '.join(map(str, errors.sizes))} features: "
        f"{errors.text()}.",
        verdict=exactly(errors.falls and abs(errors.exponent - ROOT) <= NEAR_ROOT),
        reason=f"the error changes as m to the power {errors.exponent:.2f}",
    )


def ranks(frame: pd.DataFrame) -> Judgement:
    """Judge whether the error of Linformers with equal weights decreases with every larger rank."""
    errors = _by_size(_trained(frame, "linformer"), "softmax_error_initial", "k")
    return Judgement(
        predicted=_best_of_rank(frame),
        measured=f"Relative error before training with {', '.join(map(str, errors.sizes))} mixed positions: "
        f"{errors.text()}.",
        verdict=exactly(errors.falls),
        reason="the error does not decrease with every larger rank",
    )


def estimate(frame: pd.DataFrame, name: str, size: str) -> Judgement:
    """Judge the error of the largest trained models; models that have not learnt to attend decide nothing."""
    rows = _trained(frame, name)
    errors = _by_size(rows, "softmax_error", size)
    perplexity, blind = (rows[key].median() for key in ("perplexity", "unigram_perplexity"))
    verdict: Verdict = below(errors.of_largest, WELL)
    words = reason(
        verdict, f"the error of the largest is {share(errors.of_largest.middle)}", errors.of_largest
    )
    if perplexity > HARDLY * blind:
        verdict, words = "not decided here", f"would need longer training: these {name}s hardly attend"
    return Judgement(
        predicted=f"An error of at most {share(WELL)} is good.",
        measured=f"Relative error to softmax attention of trained {name}s with "
        f"{', '.join(map(str, errors.sizes))}: {errors.text()}, at a perplexity of {perplexity:.3g} "
        f"({blind:.3g} without context).",
        verdict=verdict,
        reason=words,
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


def _best_of_rank(frame: pd.DataFrame) -> str:
    """Return the best possible error by rank, if there are attention statistics of a masked dense model."""
    try:
        rows = has(finished(frame, variant="dense", objective="mlm"), "attention_rank_error")
    except Missing:
        return "Weights of low rank are close to a matrix of low rank."
    errors = pd.DataFrame(rows["attention_rank_error"].tolist()).median()
    listed = ", ".join(f"{share(errors[k])} at rank {2**k}" for k in range(0, len(errors), 2))
    return f"Relative error of the best low-rank approximation of a masked dense model's weights: {listed}."


PARTS = {
    "Both are linear in T": linear,
    "The error of Performer decreases as 1/√m with m features": features,
    "The error of Linformer decreases with its rank": ranks,
    "Trained Performers approximate softmax well": partial(estimate, name="performer", size="n_features"),
    "Trained Linformers approximate softmax well": partial(estimate, name="linformer", size="k"),
}
