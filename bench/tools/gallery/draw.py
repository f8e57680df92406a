"""One picture of the gallery: which tokens each token of a variant reads, next to its mask."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.report.data.collect import spoken
from bench.report.figures import canvas
from bench.report.figures.style import lighter, looks
from bench.report.text import units
from bench.tools.gallery.reads import Direction, Panel, Picture, Sizes

UNREAD, FORBIDDEN = ("#D55E00", "x"), ("#0072B2", "+")
"""Colour and marker of pairs that the mask allows but that have no gradient, and of the reverse."""
FADE = 0.78
"""Lightness of pairs that are only read through all layers."""


def words(picture: Picture) -> str:
    """Return the knobs that are not defaults, such as 'window=8, dilation=1 1 3 3'."""
    values = {
        knob: " ".join(map(str, value)) if isinstance(value, list) else spoken(value)
        for knob, value in picture.knobs.items()
    }
    return ", ".join(f"{knob}={value}" for knob, value in values.items())


def counted(layers: int) -> str:
    """Return '1 layer' or '3 layers'."""
    return f"{layers} layer{'' if layers == 1 else 's'}"


def objective(direction: Direction) -> str:
    """Return the label of a figure's row."""
    return "causal" if direction.causal else "bidirectional"


def unread(panel: Panel) -> np.ndarray:
    """(T, T) bool: pairs that the mask allows but whose gradient is zero."""
    return (
        np.zeros(panel.share.shape, bool) if panel.rule is None else (panel.rule & (panel.share == 0)).numpy()
    )


def forbidden(panel: Panel) -> np.ndarray:
    """(T, T) bool: pairs that the mask forbids but whose gradient is not zero."""
    return (
        np.zeros(panel.share.shape, bool) if panel.rule is None else (~panel.rule & (panel.share > 0)).numpy()
    )


def disagrees(picture: Picture) -> bool:
    """Return whether gradients and mask differ for any pair."""
    panels = [panel for direction in picture.directions for panel in direction.panels]
    return any(unread(panel).any() or forbidden(panel).any() for panel in panels)


def stem(picture: Picture, pictures: Sequence[Picture]) -> str:
    """Return the file name of a picture: the variant's name, with a number from its second picture on."""
    count = sum(other.variant == picture.variant for other in pictures)
    return picture.variant if count < 2 else f"{picture.variant}-{count}"


def fade(layers: int, total: int) -> float:
    """Return the lightness of a pair that is read through `layers` layers, of `total` drawn."""
    return FADE * (layers - 1) / max(1, total - 1)


def _white(size: int) -> np.ndarray:
    return np.ones((size, size, 3))


def shaded(panel: Panel, colour: str) -> np.ndarray:
    """(T, T, 3): from white, if the pair is read for no input, to the colour, if for all inputs."""
    share = panel.share.numpy()[..., None]
    shade: np.ndarray = (1 - share) * _white(len(share)) + share * np.array(to_rgb(colour))
    return shade


def stepped(panels: Sequence[Panel], colour: str) -> np.ndarray:
    """(T, T, 3): the colour, lighter for pairs that need more layers to be read."""
    shade = _white(len(panels[0].share))
    for panel in reversed(panels):
        shade[panel.share.numpy() > 0] = to_rgb(lighter(colour, fade(panel.layers, len(panels))))
    return shade


def deep(panels: Sequence[Panel], colour: str) -> np.ndarray:
    """(T, T, 3): through all layers;
    shaded by the number of layers if there is a mask, else by the share of inputs."""
    return shaded(panels[-1], colour) if panels[-1].rule is None else stepped(panels, colour)


def square(axis: Axes, shade: np.ndarray, panel: Panel | None = None, *, marks: float = 3) -> None:
    axis.imshow(shade, interpolation="nearest", vmin=0, vmax=1)
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set(visible=True, color="#999999", linewidth=0.6)
    for select, (colour, marker) in ((unread, UNREAD), (forbidden, FORBIDDEN)):
        if panel is not None and (pairs := np.argwhere(select(panel))).size:
            axis.plot(pairs[:, 1], pairs[:, 0], marker, color=colour, markersize=marks, markeredgewidth=0.8)


def _titled(axis: Axes, title: str, panel: Panel) -> None:
    pairs = units.percent(panel.share.mean().item())
    axis.set_title(f"{title}: {pairs} of pairs", fontsize=8.5)


def message(axis: Axes, text: str, *, width: int, size: float) -> None:
    """Show a text instead of a picture."""
    axis.set_axis_off()
    lines = "\n".join(textwrap.wrap(text, width))
    axis.text(
        0.5, 0.5, lines, ha="center", va="center", fontsize=size, color="#555555", transform=axis.transAxes
    )


def marks(picture_panels: Sequence[Panel]) -> list[Artist]:
    """Return the last legend entries: the disagreements with the mask, and their numbers."""
    ruled = [panel for panel in picture_panels if panel.rule is not None]
    if not ruled:
        return []
    entries = (
        (UNREAD, "mask allows,\ngradient zero", unread),
        (FORBIDDEN, "mask forbids,\ngradient not zero", forbidden),
    )
    handles: list[Artist] = []
    for (colour, marker), label, select in entries:
        count = sum(int(select(panel).sum()) for panel in ruled)
        handles.append(
            Line2D([], [], linestyle="", marker=marker, color=colour, label=f"{label}: {count or 'none'}")
        )
    return handles


def legend(panels: Sequence[Panel], colour: str) -> list[Artist]:
    """Return the legend of a picture's shades."""
    if panels[-1].rule is None:
        return [
            Patch(
                facecolor=lighter(colour, 1 - share),
                edgecolor="#999999",
                label=f"read for {100 * share:.0f} % of inputs",
            )
            for share in (1.0, 0.5, 0.1)
        ]
    return [
        Patch(
            facecolor=lighter(colour, fade(panel.layers, len(panels))),
            label=f"read {'in one layer' if panel.layers == 1 else f'through {panel.layers} layers'}",
        )
        for panel in panels
    ]


def figure(picture: Picture, sizes: Sizes) -> Figure:
    """Draw one variant: a row per direction, with the mask, one layer and all layers side by side."""
    colour = looks(picture.variant)[0]
    shown = [direction for direction in picture.directions if direction.panels]
    fig, axes = canvas.panels(3 * max(1, len(shown)), width=2.5, height=2.75, columns=3)
    for row, direction in enumerate(shown):
        _row(axes[3 * row : 3 * row + 3], direction, colour)
    for axis in axes[3 * len(shown) :]:
        message(axis, "nothing to draw", width=20, size=8)
    panels = [panel for direction in shown for panel in direction.panels]
    handles = [*legend(shown[0].panels, colour), *marks(panels)] if shown else []
    absent = [f"{objective(d)}: {d.reason}" for d in picture.directions if d.reason]
    knobs = f" ({words(picture)})" if picture.knobs else ""
    averaged = (
        f"Content-based mask, averaged over {picture.inputs} random inputs. " if picture.inputs > 1 else ""
    )
    canvas.dress(
        fig,
        f"{picture.variant}{knobs}: which tokens each token reads",
        f"{averaged}Rows are queries, columns are keys.",
        ". ".join([picture.paper, provenance(sizes), *absent]),
        handles,
    )
    return fig


def provenance(sizes: Sizes) -> str:
    return (
        f"Gradients of the module in float64; below epsilon times a query's largest they count as zero; "
        f"{sizes.seq_len} tokens, width {sizes.d_model}, {sizes.heads} heads"
    )


def _row(axes: Sequence[Axes], direction: Direction, colour: str) -> None:
    """Draw the mask (or the pairs that one input reads), one layer and all layers."""
    by_rule, one, through = axes
    panels = direction.panels
    rule = panels[0].rule
    shown, source = (panels[0].example, "one input") if rule is None else (rule, "the mask")
    square(by_rule, shaded(Panel(1, shown.double(), shown, None), colour))
    by_rule.set_title(f"{objective(direction)}: {source}", fontsize=8.5)
    by_rule.set_ylabel("query position")
    square(one, shaded(panels[0], colour), panels[0])
    mean = "mean, " if rule is None else ""
    _titled(one, f"{mean}one layer", panels[0])
    square(through, deep(panels, colour), panels[-1])
    _titled(through, f"{mean}{counted(panels[-1].layers)}", panels[-1])
    size = len(panels[0].share)
    ticks = range(0, size, max(1, size // 4))
    for axis in axes:
        axis.set(xlabel="key position", xticks=ticks, yticks=ticks)
