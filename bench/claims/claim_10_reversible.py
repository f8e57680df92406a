"""Reversible layers: what they hold by depth, what they cost in quality, how far their inputs drift."""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Finding, Missing, Verdict
from bench.claims.cells import Spread, difference, figure, finished, has
from bench.report.text import units

STATEMENT = (
    "Reversible layers make activation memory independent of depth, do not cost accuracy, and drift, because "
    "floats do not subtract exactly."
)
SOURCE = (
    "Gomez 2017, arXiv:1707.04585, abstract and §3 (memory, accuracy, rounding); Kitaev 2020, "
    "arXiv:2001.04451, §3 (in a Transformer)"
)
DEPTHS = (4, 16, 64)
DTYPES = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
"""Type of numbers in matrix products → its relative rounding, half a unit in the last place (IEEE 754; of
bfloat16, 8 bits of significand)."""
SAME = 0.01
"""The share by which what is held may differ and still count as independent of depth."""


def held(frame: pd.DataFrame, activations: str) -> dict[int, float]:
    """Depth → bytes at a step's peak that are neither parameters, gradients of them, nor the optimiser's."""
    found = {}
    for depth in DEPTHS:
        cells = finished(
            frame,
            variant="dense",
            measure="plan",
            objective="clm",
            seq_len=1024,
            d_model=64,
            batch_size=4,
            activations=activations,
            depth=depth,
        )
        if (cells["peak_phase"] == "optimizer").any():
            raise Missing(f"activations={activations} depth={depth}: its peak is in the optimiser's step")
        found[depth] = figure(cells, "peak_activation_bytes") + figure(cells, "peak_workspace_bytes")
    return found


def drift(frame: pd.DataFrame, dtype: str) -> dict[int, float]:
    """Depth → the largest error of a rebuilt input, relative to that input's largest entry."""
    found = {}
    for depth in DEPTHS:
        cells = finished(
            frame,
            variant="dense",
            measure="quick",
            seq_len=256,
            d_model=64,
            activations="reversible",
            dtype=dtype,
            depth=depth,
        )
        levels = has(cells, "rebuild_error_by_level")["rebuild_error_by_level"]
        found[depth] = float(levels.map(max).median())
    return found


def quality(frame: pd.DataFrame) -> tuple[Spread, float]:
    """How many nats a token reversible layers lose after the same training, and `keep`'s loss."""
    trained = has(finished(frame, variant="dense", measure="standard", objective="clm", depth=4), "nll")
    trained = trained[(trained["seq_len"] == 256) & (trained["batch_size"] == 4)]
    if trained.empty:
        raise Missing("variant=dense measure=standard seq_len=256 batch_size=4 depth=4: no such cell")
    reversible, keep = (finished(trained, activations=name) for name in ("reversible", "keep"))
    return difference(reversible, keep, "nll").judged(), figure(keep, "nll")


def judge(frame: pd.DataFrame) -> Finding:
    """Three statements, of which each can fail."""
    memory, kept = held(frame, "reversible"), held(frame, "keep")
    lost, loss = quality(frame)
    errors = {dtype: drift(frame, dtype) for dtype in DTYPES}
    failed = []
    if max(memory.values()) > (1 + SAME) * min(memory.values()):
        failed.append(
            f"activation memory grows {units.ratio(memory[DEPTHS[-1]] / memory[DEPTHS[0]])} with depth"
        )
    if lost.low > 0:
        failed.append(f"{lost.middle:.3f} nats a token are lost")
    if not all(error > 0 for own in errors.values() for error in own.values()):
        failed.append("inputs come back exactly")
    verdict: Verdict = "does not hold here" if failed else "holds"
    by_depth = "; ".join(
        f"{dtype} {', '.join(f'{units.scientific(error)} at {depth}' for depth, error in own.items())} layers"
        for dtype, own in errors.items()
    )
    eps = ", ".join(f"{units.scientific(size)} in {dtype}" for dtype, size in DTYPES.items())
    return Finding(
        predicted="Nothing is stored a block, so what is held has no L in it. The two streams are another "
        f"network of the same size. A sum is rounded by up to {eps}, relatively, and every block adds one "
        "such error to those that it rebuilds from: the lowest is worst, and grows with L. Residual streams "
        "are float32 in both, and only the matrix products' inputs are rounded to the shorter type",
        measured=f"Activations at the peak: {', '.join(units.size(size) for size in memory.values())} at "
        f"{', '.join(str(depth) for depth in memory)} layers, with everything kept "
        f"{', '.join(units.size(size) for size in kept.values())}. Loss after the same training: "
        f"{lost.said(_nats)} against {units.score(loss)} nats a token with everything kept. Largest error of "
        f"a rebuilt input, as a share of its largest entry, before training: {by_depth}",
        verdict=verdict,
        condition="; ".join(failed),
    )


def _nats(value: float) -> str:
    return f"{value:+.3f}"
