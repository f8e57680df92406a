"""Reversible layers: their memory by depth, their effect on quality, and the drift of rebuilt inputs."""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement, Missing
from bench.claims.cells import Spread, difference, figure, finished, has
from bench.claims.parts import below, exactly, reason
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
"""dtype of matrix products → its relative rounding error, half a unit in the last place (IEEE 754; bfloat16
has 8 bits of significand)."""
MARGIN = 0.02
"""Nats per token up to which a loss counts as none: two per cent of perplexity."""
SAME = 0.01
"""Relative tolerance within which memory counts as independent of depth."""


def held(frame: pd.DataFrame, activations: str) -> dict[int, float]:
    """Return depth → bytes at a step's peak, without parameters,
    their gradients and the optimiser's state."""
    by_depth = {}
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
        by_depth[depth] = figure(cells, "peak_activation_bytes") + figure(cells, "peak_workspace_bytes")
    return by_depth


def drift(frame: pd.DataFrame, dtype: str) -> dict[int, float]:
    """Return depth → the largest error of a rebuilt input, relative to the largest entry of that input."""
    by_depth = {}
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
        by_depth[depth] = float(levels.map(max).median())
    return by_depth


def quality(frame: pd.DataFrame) -> tuple[Spread, float]:
    """Return the loss of reversible layers minus that of `keep` after the same training,
    and the loss of `keep`."""
    trained = has(finished(frame, variant="dense", measure="standard", objective="clm", depth=4), "nll")
    trained = trained[(trained["seq_len"] == 256) & (trained["batch_size"] == 4)]
    if trained.empty:
        raise Missing("variant=dense measure=standard seq_len=256 batch_size=4 depth=4: no such cell")
    reversible, keep = (finished(trained, activations=name) for name in ("reversible", "keep"))
    return difference(reversible, keep, "nll"), figure(keep, "nll")


def memory(frame: pd.DataFrame) -> Judgement:
    """Judge the activations at the peak, by depth."""
    reversible, kept = held(frame, "reversible"), held(frame, "keep")
    return Judgement(
        predicted="No activations are stored per block, so the memory does not depend on L.",
        measured=f"Activations at the peak: {', '.join(units.size(size) for size in reversible.values())} at "
        f"{', '.join(str(depth) for depth in reversible)} layers, with everything kept "
        f"{', '.join(units.size(size) for size in kept.values())}.",
        verdict=exactly(max(reversible.values()) <= (1 + SAME) * min(reversible.values())),
        reason="activation memory grows "
        f"{units.ratio(reversible[DEPTHS[-1]] / reversible[DEPTHS[0]])} with depth",
    )


def accuracy(frame: pd.DataFrame) -> Judgement:
    """Judge the loss after the same training, against a margin: noise alone shows nothing."""
    lost, loss = quality(frame)
    verdict = below(lost, MARGIN)
    return Judgement(
        predicted="The network with two streams is a different one of the same size.",
        measured=f"Loss after the same training: {lost.text(_nats)} relative to {units.score(loss)} nats per "
        f"token with everything kept. Up to {MARGIN:g} is none.",
        verdict=verdict,
        reason=reason(verdict, f"the loss is higher by {lost.middle:.3f} nats per token", lost),
    )


def rounding(frame: pd.DataFrame) -> Judgement:
    """Judge whether rebuilt inputs have an error that grows with depth."""
    errors = {dtype: drift(frame, dtype) for dtype in DTYPES}
    by_depth = "; ".join(
        f"{dtype} {', '.join(f'{units.scientific(error)} at {depth}' for depth, error in own.items())} layers"
        for dtype, own in errors.items()
    )
    eps = ", ".join(f"{units.scientific(size)} in {dtype}" for dtype, size in DTYPES.items())
    drifts = all(min(own.values()) > 0 and own[DEPTHS[-1]] > own[DEPTHS[0]] for own in errors.values())
    return Judgement(
        predicted=f"The relative rounding error of a sum is up to {eps}, and every block adds one such error "
        "when it is rebuilt: the error is largest in the lowest block and grows with L. Residual streams are "
        "float32 in both cases; only inputs of matrix products are rounded.",
        measured="Largest error of a rebuilt input, relative to its largest entry, before training: "
        f"{by_depth}.",
        verdict=exactly(drifts),
        reason="inputs are rebuilt exactly, or their error does not grow with depth",
    )


def _nats(value: float) -> str:
    return f"{value:+.3f}"


PARTS = {
    "Activation memory does not depend on depth": memory,
    "Reversible layers do not cost accuracy": accuracy,
    "Rebuilt inputs drift, more in deeper networks": rounding,
}
