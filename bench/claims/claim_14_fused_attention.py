"""Fused attention against stored scores: the same result, executed FLOPs and time of a step.

`dense` with `impl=naive` computes scores, softmax and the weighted sum one after the other; `impl=sdpa` is
torch's fused kernel, which computes the scores of the forward pass again in the backward pass. FLOPs and time
are compared for bidirectional models, in which neither of them skips pairs.
"""

from __future__ import annotations

import itertools

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.cells import difference, disturbed, figure, finished, has, ratio, step_time
from bench.claims.parts import above, every, exactly, like, one_setting, points, reason, within
from bench.report.text import units

STATEMENT = "Fused attention is exact, executes more FLOPs than attention with stored scores, and is faster."
SOURCE = "Dao 2022, arXiv:2205.14135, abstract, §1 (recomputation) and §3.1, Theorem 1 (exact)"
EQUAL = 0.002
"""Nats per token within which two losses are *the same*: rounding, which training amplifies, but no seed."""
FASTER = 1.05
"""Ratio of times above which a step is *faster*: a margin against the noise of pairs of equal cells."""
MORE = 1.01
"""Ratio of FLOPs above which there are *more*; both are counted without noise."""


def exact(frame: pd.DataFrame) -> Judgement:
    """Judge the loss after the same training, from the same seed."""
    rows = has(finished(frame, variant="dense", objective="clm", measure="standard"), "nll")
    naive = one_setting(finished(rows, variant="dense", knobs={"impl": "naive"}))
    fused = finished(rows, variant="dense", knobs={"impl": "sdpa"}, **like(naive))
    gap = difference(fused, naive, "nll")
    errors = [figure(own, "reference_max_abs") for own in (fused, naive)]
    verdict = within(gap, -EQUAL, EQUAL)
    return Judgement(
        predicted="Both compute the same sums in another order, so they differ by rounding alone.",
        measured=f"Largest difference from the reference: fused {units.scientific(errors[0])}, stored "
        f"{units.scientific(errors[1])}. Loss with the fused kernel minus that with stored scores, same "
        f"seeds, after {naive.iloc[0]['tokens_trained']:,.0f} tokens of training: {gap.text(points)} nats "
        f"per token. Up to {EQUAL:g} is the same.",
        verdict=verdict,
        reason=reason(verdict, f"the losses differ by {points(gap.middle)} nats per token", gap),
    )


def _timed(frame: pd.DataFrame, impl: str) -> pd.DataFrame:
    return finished(
        frame,
        variant="dense",
        objective="mlm",
        measure="quick",
        depth=1,
        d_model=256,
        knobs={"impl": impl},
    )


def _by_length(frame: pd.DataFrame) -> dict[int, tuple[pd.DataFrame, pd.DataFrame]]:
    """Return the length → the timed cells with stored scores and with the fused kernel."""
    naive, fused = (_timed(frame, impl) for impl in ("naive", "sdpa"))
    lengths = [int(seq_len) for seq_len in sorted(naive["seq_len"].unique())]
    return {n: (naive[naive["seq_len"] == n], finished(fused, variant="dense", seq_len=n)) for n in lengths}


def flops(frame: pd.DataFrame) -> Judgement:
    """Judge the executed FLOPs of a step at every length."""
    more = {
        seq_len: figure(fused, "flops_executed_step") / figure(naive, "flops_executed_step")
        for seq_len, (naive, fused) in _by_length(frame).items()
    }
    listed = ", ".join(f"{units.ratio(own)} at {seq_len:,} tokens" for seq_len, own in more.items())
    return Judgement(
        predicted="The backward pass of the fused kernel computes the scores again: 2.5 times the FLOPs of "
        "its forward pass instead of twice, in attention.",
        measured=f"Executed FLOPs of a step relative to stored scores: {listed}.",
        verdict=exactly(all(own > MORE for own in more.values())),
        reason=f"a step executes {listed} the FLOPs",
    )


def time(frame: pd.DataFrame) -> Judgement:
    """Judge the time of a step at every length."""
    cells = _by_length(frame)
    gains = {seq_len: ratio(*both, step_time(*both)) for seq_len, both in cells.items()}
    verdicts = {seq_len: above(gain, FASTER) for seq_len, gain in gains.items()}
    verdict = every([*verdicts.values()])
    slow = [f"{seq_len:,}" for seq_len, own in verdicts.items() if own == "contradicted"]
    return Judgement(
        predicted="Scores that are not stored are neither written to memory nor read again; the longer the "
        "sequence, the more this is of a step.",
        measured="A step with stored scores takes, relative to the fused kernel, "
        + "; ".join(f"{gain.text(units.ratio)} at {seq_len:,} tokens" for seq_len, gain in gains.items())
        + f"{disturbed(*itertools.chain(*cells.values()))}. Above {units.ratio(FASTER)} the fused kernel is "
        "faster.",
        verdict=verdict,
        reason=reason(verdict, f"it is not faster at {' and '.join(slow)} tokens", *gains.values()),
    )


PARTS = {
    "It is exact: the same training leads to the same loss": exact,
    "It executes more FLOPs, because the backward pass computes the scores again": flops,
    "A step is faster nevertheless": time,
}
