"""A variant's marker and colour for a browser: the plots' own, as SVG paths and with colours for the dark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.colors import to_hex, to_rgb
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path
from matplotlib.transforms import Affine2D, Transform

from bench.report.figures.style import Style, lighter

DARK = "#14181f"
"""The page's background in dark mode."""
LEAST = 3.5
"""Minimum contrast of a mark with the background; WCAG 2.2 requires 3 (1.4.11)."""
_LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}


def symbols(styles: Mapping[str, Style]) -> dict[str, dict[str, Any]]:
    """Label → its `colour` on white and on `dark`, the `outline` of its marker and, of one that is filled
    by half, the `half`; paths in the square from −1 to 1."""
    return {
        label: {
            "colour": style.colour,
            "dark": on_dark(style.colour),
            "outline": _svg(MarkerStyle(style.marker)),
            "half": None if style.fill == "full" else _svg(MarkerStyle(style.marker, fillstyle=style.fill)),
        }
        for label, style in styles.items()
    }


def on_dark(colour: str) -> str:
    """The colour, lightened until it contrasts with the dark background; greys are inverted."""
    red, green, blue = to_rgb(colour)
    if red == green == blue:
        colour = to_hex((1 - red, 1 - red, 1 - red))
    shares = (step / 20 for step in range(21))
    return next(c for c in (lighter(colour, share) for share in shares) if contrast(c, DARK) >= LEAST)


def contrast(one: str, other: str) -> float:
    """The ratio of two colours' luminances, from 1 to 21 (WCAG 2.2)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _svg(marker: MarkerStyle) -> str:
    """A marker's path; a browser's y axis points down."""
    placed: Transform = marker.get_transform() + Affine2D().scale(2, -2)
    path = marker.get_path().transformed(placed)
    words = []
    for points, code in path.iter_segments(simplify=False, curves=True):
        pairs = [] if code == Path.CLOSEPOLY else [f"{round(value, 3) + 0:g}" for value in points]
        words.append(_LETTERS[code] + ",".join(pairs))
    return "".join(words)
