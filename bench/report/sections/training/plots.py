"""Loss against the tokens of training, a line a variant: on the trained batches and the validation split."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.figures.baselines import in_loss_unit, loss_unit
from bench.report.figures.families import Family, Line, draw_family
from bench.report.figures.lines import Look
from bench.report.text import units

BINS = 48
"""Points of a training curve: each is the mean of the rows between it and the point before."""


def training_loss(frame: pd.DataFrame, look: Look) -> Figure | None:
    """Loss of training against tokens; takes `curves.training_curves`."""
    family = Family(
        title="Training loss",
        x="tokens trained on",
        y=_unit(frame),
        baselines=True,
        footer="median and min–max over {}; a point is the mean of the steps since the one before",
        line=_binned,
        axis=_tokens,
        markers=False,
    )
    return draw_family(frame, look, family)


def validation_loss(frame: pd.DataFrame, look: Look) -> Figure | None:
    """Loss on the validation split against tokens; takes records that have `validation_tokens`.

    The baselines are not drawn, because they are scored on another split.
    """
    family = Family(
        title="Validation loss",
        x="tokens trained on",
        y=_unit(frame),
        footer="mean and min–max over {}; the same text of the validation split each time",
        line=_validated,
        axis=_tokens,
    )
    return draw_family(frame, look, family)


def _unit(frame: pd.DataFrame) -> str:
    return loss_unit(frame) if frame["bits_per_byte"].notna().any() else "nats per target"


def _validated(own: pd.DataFrame) -> Line | None:
    """Mean and range over the records that were validated after the same number of tokens."""
    points = [
        (tokens, factor * nats)
        for at, losses, factor in zip(
            own["validation_tokens"], own["validation_nll"], in_loss_unit(own), strict=True
        )
        for tokens, nats in zip(at, losses, strict=False)
        if tokens is not None and nats is not None
    ]
    if not points:
        return None
    losses = pd.DataFrame(points, columns=["tokens", "loss"]).groupby("tokens")["loss"]
    means = losses.mean()
    return Line(
        means.index.to_numpy(dtype=float), *(s.to_numpy() for s in (means, losses.min(), losses.max()))
    )


def _tokens(axis: Axes, largest: float) -> None:
    axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter(lambda value, _: units.count(value, short=True))
    axis.set_xlim(0, None)


def _binned(own: pd.DataFrame) -> Line | None:
    """Each curve's mean in equal parts of the tokens of the shortest, then the median over the curves."""
    end = min(float(curve["tokens"].iloc[-1]) for curve in own["curve"])
    edges = np.linspace(0, end, BINS + 1)
    means = []
    for curve, factor in zip(own["curve"], in_loss_unit(own), strict=True):
        bins = pd.cut(curve["tokens"], edges.tolist(), labels=False)
        means.append(factor * curve["nll"].groupby(bins).mean().reindex(range(BINS)))
    table = pd.DataFrame(means)
    has_value = table.notna().any().to_numpy()
    statistics = (table.median(), table.min(), table.max())
    return Line(edges[1:][has_value], *(s.to_numpy()[has_value] for s in statistics))
