"""Recall of key–value pairs by attention, and by models whose state does not grow with the sequence.

The task is multi-query associative recall (`data=mqar`). A model with a fixed state takes part if it recalls
the fewest pairs, i.e. has learnt the task: otherwise its errors would show its training, not its state. The
cells of `experiment=claims_recall` are sliding windows, whose state is their keys and values.
"""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement, Missing
from bench.claims.cells import Spread, by_replicate, difference, finished, has
from bench.claims.parts import above, every, reason, share
from bench.report.text import units

STATEMENT = "A state of fixed size limits recall: attention recalls all pairs, a fixed state fewer of many."
SOURCE = (
    "Arora 2023, arXiv:2312.04927, §4 (multi-query associative recall); Jelassi 2024, arXiv:2402.01032, "
    "abstract and §2 (a fixed-size state limits copying)"
)
RECALLS = 0.9
"""Accuracy above which a model *recalls* its pairs."""
LESS = 0.1
"""Difference of accuracies above which one recalls *less*: a margin against noise between replicates."""


def _rows(frame: pd.DataFrame, variant: str | None = None) -> pd.DataFrame:
    """Return the cells of the task with their number of `pairs`; without a variant, all but dense."""
    dense = finished(frame, variant="dense", data="mqar")
    rows = dense if variant else frame[(frame["data"] == "mqar") & (frame["variant"] != "dense")]
    if not variant:
        names = tuple(sorted(set(rows["variant"])))
        if not names:
            raise Missing(
                "variant=longformer data=mqar, or another one with a state of fixed size: no such cell"
            )
        rows = finished(rows, variant=names, data="mqar")
    rows = has(rows, "accuracy")
    return rows.assign(pairs=rows["data_params"].map(lambda params: int(params["n_pairs"])))


def _of(rows: pd.DataFrame, pairs: int) -> pd.DataFrame:
    return rows[rows["pairs"] == pairs]


def _name(rows: pd.DataFrame) -> str:
    return str(rows.iloc[0]["label"])


def attention(frame: pd.DataFrame) -> Judgement:
    """Judge the accuracy of dense attention at the largest number of pairs."""
    dense = _rows(frame, "dense")
    most = int(dense["pairs"].max())
    recalled = Spread.plain(by_replicate(_of(dense, most), "accuracy"))
    verdict = above(recalled, RECALLS)
    return Judgement(
        predicted="The state of attention is all keys and values, so no pair is lost.",
        measured=f"Accuracy of dense attention with {most} pairs: {recalled.text(share)}; above "
        f"{share(RECALLS)} it recalls them.",
        verdict=verdict,
        reason=reason(verdict, f"it recalls {share(recalled.middle)}", recalled),
    )


def fixed(frame: pd.DataFrame) -> Judgement:
    """Judge, for each fixed state that recalls few pairs, the share of many pairs that it recalls."""
    dense, others = _rows(frame, "dense"), _rows(frame)
    few, most = int(others["pairs"].min()), int(dense["pairs"].max())
    if few >= most:
        raise Missing("data=mqar at two values of n_pairs")
    lost: dict[str, Spread] = {}
    for _, own in others.groupby(["variant", "params_json"]):
        learnt = _of(own, few)
        if learnt.empty or above(Spread.plain(by_replicate(learnt, "accuracy")), RECALLS) != "shown":
            continue
        lost[_name(own)] = difference(_of(dense, most), _of(own, most), "accuracy")
    if not lost:
        reason_open = (
            f"would need a fixed state that recalls {few} pairs in {RECALLS:.0%} of the cases: more training"
        )
        return Judgement(verdict="not decided here", reason=reason_open)
    verdict = every([above(own, LESS) for own in lost.values()])
    listed = "; ".join(f"{name} {own.text(share)}" for name, own in lost.items())
    return Judgement(
        predicted=f"A state that holds {few} pairs holds a smaller share of {most}.",
        measured=f"Accuracy of dense attention minus that of models that recall {few} pairs, with {most}: "
        f"{listed}. More than {share(LESS)} is less.",
        verdict=verdict,
        reason=reason(
            verdict, f"with {most} pairs a fixed state recalls as much as attention", *lost.values()
        ),
    )


def larger(frame: pd.DataFrame) -> Judgement:
    """Judge the largest against the smallest state of each variant, at the largest number of pairs."""
    others = has(_rows(frame), "state_bytes")
    most = int(others["pairs"].max())
    gains: dict[str, Spread] = {}
    for variant, own in _of(others, most).groupby("variant"):
        sizes = own["state_bytes"]
        small, large = (own[sizes == size] for size in (sizes.min(), sizes.max()))
        if sizes.nunique() > 1:
            ends = " to ".join(units.size(float(size)) for size in (sizes.min(), sizes.max()))
            gains[f"{variant}, {ends}"] = difference(large, small, "accuracy")
    if not gains:
        raise Missing(
            f"variant={others.iloc[0]['variant']} data=mqar n_pairs={most} with two sizes of its state"
        )
    verdict = every([above(gain, LESS) for gain in gains.values()])
    return Judgement(
        predicted="What a state can hold grows with its size.",
        measured=f"Accuracy with {most} pairs, largest minus smallest state: "
        + "; ".join(f"{name}: {gain.text(share)}" for name, gain in gains.items())
        + f". More than {share(LESS)} is more.",
        verdict=verdict,
        reason=reason(verdict, "a larger state recalls no more", *gains.values()),
    )


PARTS = {
    "Attention recalls all pairs": attention,
    "A fixed state that recalls few pairs recalls less of many": fixed,
    "A larger state recalls more": larger,
}
