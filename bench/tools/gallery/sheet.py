"""The overview of the gallery: all pictures in one small-scale figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.report.figures.style import looks
from bench.tools.gallery import draw
from bench.tools.gallery.reads import Picture, Sizes
from variants.facts import family

NEUTRAL = "#000000"
"""Colour of the legend, which applies to all colours."""
FEWEST_COLUMNS, MOST_COLUMNS = 3, 5
SQUARE, GAP, TITLE, BLOCK = 1.15, 0.07, 0.5, (2.6, 3.1)
MARGIN, HEAD, FOOT = 0.35, 0.75, 0.75
"""Sizes in inches: a panel, the gap between two panels, a title, a picture with its margins;
the margins of the sheet."""


def sheet(pictures: Sequence[Picture], sizes: Sizes) -> Figure:
    """Draw all pictures in one figure: causal above bidirectional, one layer next to all layers."""
    columns = min(MOST_COLUMNS, max(FEWEST_COLUMNS, len(pictures)))
    rows = -(-len(pictures) // columns)
    wide, high = MARGIN + columns * BLOCK[0], HEAD + rows * BLOCK[1] + FOOT
    fig = Figure(figsize=(wide, high))
    FigureCanvasAgg(fig)
    for place, picture in enumerate(pictures):
        left, top = MARGIN + place % columns * BLOCK[0], HEAD + place // columns * BLOCK[1]
        _block(fig, picture, left, top, labelled=not place % columns)
    deepest = draw.counted(sizes.layers)
    fig.text(0.1 / wide, 1 - 0.1 / high, "Which tokens each token reads", fontsize=13, va="top")
    lead = (
        f"Rows are queries, the first at the top; columns are keys. "
        f"Left: one layer, right: {deepest}; top: causal, bottom: bidirectional."
    )
    lead = "\n".join(textwrap.wrap(lead, int(14 * wide)))
    fig.text(0.1 / wide, 1 - 0.38 / high, lead, fontsize=8.5, va="top", color="#555555")
    panels = [panel for picture in pictures for d in picture.directions for panel in d.panels]
    ruled = [panel for panel in panels if panel.rule is not None][: sizes.layers]
    handles = [*(draw.legend(ruled, NEUTRAL) if ruled else []), *draw.marks(panels)]
    fig.legend(handles=handles, loc="lower left", ncols=columns, fontsize=8, bbox_to_anchor=(0, 0.18 / high))
    note = f"* content-based mask: darker for more of {sizes.inputs} random inputs. {draw.provenance(sizes)}"
    note = "\n".join(textwrap.wrap(note, int(17 * wide)))
    fig.text(0.1 / wide, 0.1 / high, note, fontsize=7, color="#555555")
    return fig


def _block(fig: Figure, picture: Picture, left: float, top: float, *, labelled: bool) -> None:
    """Draw one picture of the sheet; `left` and `top` are in inches."""
    wide, high = fig.get_size_inches()
    colour = looks(picture.variant)[0]
    star = "*" if picture.inputs > 1 else ""
    title = [picture.variant + star, *textwrap.wrap(draw.words(picture), 36)]
    fig.text(left / wide, 1 - (top + 0.02) / high, title[0], fontsize=9.5, va="top", weight="bold")
    fig.text(
        (left + 2 * SQUARE + GAP) / wide,
        1 - (top + 0.04) / high,
        family(picture.variant),
        fontsize=6.5,
        va="top",
        ha="right",
        color=colour,
    )
    fig.text(
        left / wide, 1 - (top + 0.2) / high, "\n".join(title[1:]), fontsize=6.5, va="top", color="#555555"
    )
    for row, direction in enumerate(picture.directions):
        y = top + TITLE + row * (SQUARE + GAP)
        boxes = [
            fig.add_axes(
                (
                    (left + column * (SQUARE + GAP)) / wide,
                    1 - (y + SQUARE) / high,
                    SQUARE / wide,
                    SQUARE / high,
                )
            )
            for column in range(2)
        ]
        if labelled:
            place = ((left - 0.1) / wide, 1 - (y + SQUARE / 2) / high)
            fig.text(*place, draw.objective(direction), fontsize=7.5, rotation=90, ha="center", va="center")
        if not direction.panels:
            boxes[1].remove()
            boxes[0].set_position(
                (left / wide, 1 - (y + SQUARE) / high, (2 * SQUARE + GAP) / wide, SQUARE / high)
            )
            draw.message(boxes[0], direction.reason or "", width=34, size=6.5)
            continue
        first, last = direction.panels[0], direction.panels[-1]
        draw.square(boxes[0], draw.shaded(first, colour), first, marks=1.5)
        draw.square(boxes[1], draw.deep(direction.panels, colour), last, marks=1.5)
        for box in boxes:
            box.set(xticks=[], yticks=[])
