"""The distribution of attention rows over their keys,
and the share that clusters of queries and keys capture."""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.cells import Spread, by_replicate, finished, has
from bench.claims.parts import above, one_setting, reason, share

STATEMENT = "Attention rows are dominated by a few large terms, so clustering approximates them."
SOURCE = "Kitaev 2020, arXiv:2001.04451, §2; Roy 2020, arXiv:2003.05997, §4.1"

FEW = 32
"""Number of terms that counts as *few*:
Kitaev's §2 considers the 32 or 64 closest of 64 thousand keys sufficient."""
MOST = 0.5
"""Share of a row's mass above which terms *dominate* it, and above which clusters *approximate* it."""


def _rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the dense causal models with attention statistics, at the longest sequence."""
    rows = has(finished(frame, variant="dense", objective="clm"), "attention_mass", "cluster_mass")
    return one_setting(rows[rows["seq_len"] == rows["seq_len"].max()])


def _in_largest(rows: pd.DataFrame, name: str, terms: int) -> Spread:
    """Return the element of a list for the given number of terms, a power of two."""
    place = terms.bit_length() - 1
    return Spread.of(by_replicate(rows.assign(one=[mass[place] for mass in rows[name]]), "one"))


def terms(frame: pd.DataFrame) -> Judgement:
    """Judge the share of a row's mass in its few largest terms."""
    rows = _rows(frame)
    few = min(FEW, 2 ** (min(map(len, rows["attention_mass"])) - 1))
    largest, alike = (_in_largest(rows, name, few) for name in ("attention_mass", "attention_mass_uniform"))
    fewer = [2**k for k in range(few.bit_length() - 1)]
    masses = [f"{share(_in_largest(rows, 'attention_mass', n).middle)} in {n}" for n in fewer]
    trained, length = rows.iloc[0][["tokens_trained", "seq_len"]]
    verdict = above(largest, MOST)
    return Judgement(
        predicted=f"With uniform weights, the {few} largest of a row would have {share(alike.middle)} "
        "of its mass.",
        measured=f"Dense attention after {trained:,.0f} tokens of training, held-out text, rows of more than "
        f"{length // 2} terms: the largest have {', '.join(masses)} and {largest.text(share)} in {few}.",
        verdict=verdict,
        reason=reason(
            verdict,
            f"the {few} largest terms have {share(largest.middle)} of a row's mass, "
            f"{largest.middle / alike.middle:.1f} times the share with uniform weights",
            largest,
        ),
    )


def clusters(frame: pd.DataFrame) -> Judgement:
    """Judge the share of a row's mass in the query's cluster."""
    rows = _rows(frame)
    caught, alike, best = (
        Spread.of(by_replicate(rows, name))
        for name in ("cluster_mass", "cluster_mass_uniform", "cluster_mass_best")
    )
    times, verdict = caught.middle / alike.middle, above(caught, MOST)
    return Judgement(
        predicted=f"With uniform weights, a query's cluster, one of √T, would have {share(alike.middle)} of "
        "the mass, its share of the keys.",
        measured=f"The cluster has {caught.text(share)}, by spherical k-means over queries and keys; the "
        f"same number of largest terms has {share(best.middle)}.",
        verdict=verdict,
        reason=reason(
            verdict,
            f"clusters capture {share(caught.middle)} of a row's mass, {times:.1f} times the share with "
            f"uniform weights, and miss {share(1 - caught.middle)}",
            caught,
        ),
    )


PARTS = {
    "A few large terms dominate an attention row": terms,
    "Clusters of queries and keys approximate it": clusters,
}
