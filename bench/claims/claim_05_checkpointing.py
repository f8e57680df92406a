"""Checkpointing: the time that recomputation costs, and whether a larger batch compensates for it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.claims.base import Judgement, Missing
from bench.claims.cells import Spread, by_replicate, disturbed, figure, finished, ratio, step_time
from bench.claims.parts import above, below, every, reason, some
from bench.report.data.groups import split
from bench.report.data.kinds import kinds
from bench.report.text import units

STATEMENT = (
    "Checkpointing costs at worst one more forward pass (up to 50 % of time), and can be faster overall "
    "through a larger batch under the same memory."
)
SOURCE = "Chen 2016, arXiv:1604.06174, abstract and §4; that it can be faster is said in popular accounts"
FORWARD = 1.0
ABOUT = 0.1
"""Relative tolerance of *one more*: an interval around exactly one must be able to lie below the limit."""
MOST = 1.5
"""Maximum claimed step time, relative to the step that keeps all activations."""
SETTING = ("seq_len", "depth", "d_model", "budget_bytes")


def costs(frame: pd.DataFrame) -> list[tuple[str, Spread, Spread, float]]:
    """Return, for each length at equal batch: the step time relative to `keep`, the additional time in
    forward passes, and the executed FLOPs relative to `keep`."""
    keys: dict[str, Any] = {
        "variant": "dense",
        "measure": "quick",
        "objective": "clm",
        "depth": 4,
        "d_model": 256,
        "batch_size": 1,
        "budget_bytes": None,
    }
    every = finished(frame, **keys, activations="checkpoint")
    by_length = []
    for seq_len, cells in every.groupby("seq_len", sort=True):
        keep = finished(frame, **keys, activations="keep", seq_len=seq_len)
        more = ratio(cells, keep, step_time(cells, keep))
        step, base = (by_replicate(own, "step_seconds_median") for own in (cells, keep))
        added = ((step - base) / by_replicate(keep, "forward_seconds_median")).dropna()
        flops = figure(cells, "flops_executed_step") / figure(keep, "flops_executed_step")
        by_length.append((f"{seq_len:,} tokens", more, Spread.plain(added), flops))
    return by_length


def gains(frame: pd.DataFrame) -> list[tuple[dict[str, Any], Spread, int, int]]:
    """Return, for each setting: the throughput relative to `keep`, each at its largest batch that fits, and
    both batch sizes.

    Raises Missing if a setting lacks one of them.
    """
    payoff = kinds(frame).payoff
    cells = payoff[payoff["variant"] == "dense"]
    if cells.empty:
        raise Missing("variant=dense batch_size=fit: no such cell")
    by_setting = []
    for values, own in split(cells, SETTING):
        keep, checkpoint = (finished(own, activations=name) for name in ("keep", "checkpoint"))
        batches = [int(figure(rows, "largest_batch_size")) for rows in (keep, checkpoint)]
        gain = ratio(checkpoint, keep, "tokens_per_second")
        by_setting.append((values, gain, batches[0], batches[1]))
    return by_setting


def cost(frame: pd.DataFrame) -> Judgement:
    """Judge the cost at equal batch, at every length."""
    measured = costs(frame)
    verdicts = [
        every([below(added, (1 + ABOUT) * FORWARD), below(more, MOST)]) for _, more, added, _ in measured
    ]
    verdict = every(verdicts)
    dearer = [name for (name, *_), own in zip(measured, verdicts, strict=True) if own == "contradicted"]
    return Judgement(
        predicted="A step is one forward pass and a backward pass of two (2.5 in the fused kernel, which "
        f"computes the scores again); one more forward pass makes it {units.ratio(4 / 3)} in FLOPs, and at "
        f"most {units.ratio(MOST)} in time, where the backward pass is as quick as the forward one.",
        measured="; ".join(
            f"at {name} the step takes {more.text(units.ratio)} the time, which adds "
            f"{added.text(units.digits)} forward passes, and {units.ratio(flops)} the FLOPs"
            for name, more, added, flops in measured
        )
        + disturbed(finished(frame, variant="dense", measure="quick", activations=("keep", "checkpoint")))
        + ".",
        verdict=verdict,
        reason=reason(
            verdict,
            f"more than a forward pass, or 50 %, at {' and '.join(dearer)}",
            *(own for _, *both, _ in measured for own in both),
        ),
    )


def batch(frame: pd.DataFrame) -> Judgement:
    """Judge whether the freed memory, spent on a larger batch, makes a step faster in some setting."""
    measured = gains(frame)
    verdict = some([above(gain, 1.0) for _, gain, *_ in measured])
    return Judgement(
        predicted="Larger batches pay where something is spent once a step: starting operations, reading "
        "weights, the optimiser.",
        measured="With as many sequences as fit: "
        + "; ".join(
            f"{_setting(values)}: {many} with checkpointing, {few} with everything kept, and "
            f"{own.text(units.ratio)} its tokens/s"
            for values, own, few, many in measured
        )
        + ".",
        verdict=verdict,
        reason=reason(
            verdict, "a larger batch is slower in every setting", *(gain for _, gain, *_ in measured)
        ),
    )


def _setting(values: dict[str, Any]) -> str:
    return (
        f"sequences of {values['seq_len']:,} tokens, {values['depth']} layers of width {values['d_model']}, "
        f"{units.size(values['budget_bytes'], short=True)}"
    )


PARTS = {
    "Checkpointing costs at worst one more forward pass, up to 50 % of time": cost,
    "It can be faster overall through a larger batch under the same memory": batch,
}
