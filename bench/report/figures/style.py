"""The colour and marker of each variant, the same in every figure and experiment.

They follow from the variant's family and its place by name among the installed variants of this family: a
family is a range of hues, and its members differ in lightness and marker. So no list of variants is kept, and
the other variants of an experiment change nothing. Where many variants meet, the marker decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from matplotlib.colors import to_hex, to_rgb

import variants
from bench.report.data.groups import COMMON
from variants.facts import MIXTURE, UNKNOWN, family

Fill = Literal["full", "left", "bottom", "right", "top"]

DENSE = "dense"
FAMILIES: dict[str, float] = {
    DENSE: 0,
    "fixed patterns": 255,
    "learned patterns": 38,
    "low rank": 335,
    "kernels": 80,
    "recurrence": 195,
    "memory": 150,
    "downsampling": 295,
}
"""Family, in the order of figures and legends → its hue in degrees (OKLCH); dense is black. The families of
the survey (`variants.base.Info.family`); others follow by name, with the `SPARE_HUES`."""
SPARE_HUES = (115, 10, 225, 315, 60, 175)
LAST_FAMILIES = (MIXTURE, UNKNOWN)
"""They come last. Mixtures are grey; variants that are unknown here have all hues."""
LIGHTNESS = (0.36, 0.66)
"""Range of OKLCH: the lightest has a contrast of 3 with white."""
CHROMA = 0.16
ALL_HUES = (0.0, 360.0)
HUE_RANGE = 24
"""Width of a family's range of hues, in degrees."""
GOLDEN = (math.sqrt(5) - 1) / 2
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "<", ">", "*", "h", "d", "8", "H")
MARKER_STEP = 4
"""Families begin this many markers apart, so that the first members of two families differ in them."""
# Ways of saving activations, in the order in which tables and figures have them.
STRATEGIES: dict[str, tuple[str, str]] = {
    "keep": ("#000000", "o"),
    "checkpoint": ("#0072B2", "s"),
    "sqrt": ("#56B4E9", "D"),
    "selective": ("#009E73", "^"),
    "reversible": ("#D55E00", "v"),
    "offload": ("#CC79A7", "P"),
}
OTHER_STRATEGIES: tuple[tuple[str, str], ...] = (
    ("#AA4499", "8"),
    ("#117733", "d"),
    ("#DDCC77", "X"),
)
FILLS: tuple[Fill, ...] = ("full", "left", "bottom", "right", "top")


@dataclass(frozen=True)
class Style:
    """A colour as #rrggbb, a matplotlib marker and how it is filled."""

    colour: str
    marker: str
    fill: Fill


def looks(variant: str, names: Iterable[str] = ()) -> tuple[str, str]:
    """Colour and marker of a variant, which is among the names; see `looks_of`."""
    return looks_of([variant, *names])[variant]


def looks_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Variant → colour and marker, for each of the names.

    That of an installed variant does not depend on the other names. A name that is not installed takes its
    place by name among the other such ones.
    """
    wanted = set(names)
    members: dict[str, list[str]] = {}
    for name in sorted({*_installed(), *wanted}):
        members.setdefault(family(name), []).append(name)
    result = {}
    for place, group in enumerate(sorted(members, key=_family_key)):
        hues = _hues(group, members)
        for number, name in enumerate(members[group]):
            marker = MARKERS[(MARKER_STEP * place + number) % len(MARKERS)]
            if name in wanted:
                result[name] = ("#000000" if group == DENSE else _colour(hues, number), marker)
    return result


def _installed() -> list[str]:
    try:
        return variants.names()
    except variants.PluginClash:  # the report of a run needs no plug-in
        return []


def _hues(group: str, groups: Iterable[str]) -> tuple[float, float] | None:
    """The middle and the width of a family's range of hues; None is grey."""
    if group == MIXTURE:
        return None
    if group == UNKNOWN:
        return ALL_HUES
    if group in FAMILIES:
        return FAMILIES[group], HUE_RANGE
    others = sorted({*groups} - {*FAMILIES, *LAST_FAMILIES})
    return SPARE_HUES[others.index(group) % len(SPARE_HUES)], HUE_RANGE


def _colour(hues: tuple[float, float] | None, number: int) -> str:
    """The colour of a family's member. Irrational steps keep neighbours apart, however many there are."""
    low, high = LIGHTNESS
    lightness = low + (high - low) * ((0.5 + number * GOLDEN) % 1)
    if hues is None:
        return _oklch(lightness, 0.0, 0.0)
    middle, width = hues
    return _oklch(lightness, CHROMA, middle + width * ((0.5 + number * math.sqrt(2)) % 1 - 0.5))


def _oklch(lightness: float, chroma: float, hue: float) -> str:
    """#rrggbb of a colour in OKLCH (Ottosson 2020); the chroma is lowered until a screen can show it."""
    angle = math.radians(hue)
    while True:
        a, b = chroma * math.cos(angle), chroma * math.sin(angle)
        long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
        middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
        short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
        linear = (
            4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
        )
        if chroma == 0 or all(-1e-4 <= value <= 1 + 1e-4 for value in linear):
            break
        chroma = max(0.0, chroma - 0.005)
    red, green, blue = (min(1.0, max(0.0, value)) for value in linear)
    return to_hex((_encoded(red), _encoded(green), _encoded(blue)))


def _encoded(linear: float) -> float:
    """The sRGB transfer function."""
    encoded = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return min(1.0, encoded)


def _family_key(group: str) -> tuple[int, str]:
    """The order of families: those of `FAMILIES`, others by name, those without a hue."""
    order = list(FAMILIES)
    if group in order:
        return order.index(group), group
    return len(order) + (1 + LAST_FAMILIES.index(group) if group in LAST_FAMILIES else 0), group


def variant_rank(variant: str) -> tuple[int, str, str]:
    """Sort key of variants: family by family, dense first. Its second element is the family."""
    return (*_family_key(family(variant)), variant)


def strategy_rank(strategy: str) -> int:
    """Its place among the ways of saving activations; one not known by name comes after them."""
    known = list(STRATEGIES)
    return known.index(strategy) if strategy in known else len(known)


def strategy_styles(strategies: Iterable[str]) -> dict[str, Style]:
    """Strategy → style, in order; unknown ones take theirs by sorted name."""
    ordered = sorted(set(strategies), key=lambda name: (strategy_rank(name), name))
    unknown = [name for name in ordered if name not in STRATEGIES]
    result = {}
    for name in ordered:
        colour, marker = STRATEGIES.get(name) or OTHER_STRATEGIES[unknown.index(name) % len(OTHER_STRATEGIES)]
        result[name] = Style(colour, marker, "full")
    return result


def lighter(colour: str, share: float) -> str:
    """The colour, that share of the way to white."""
    red, green, blue = (c + (1 - c) * share for c in to_rgb(colour))
    return to_hex((red, green, blue))


def styles(cells: Iterable[tuple[str, str]]) -> dict[str, Style]:
    """Label → style for (variant, label) pairs; a variant's labels go lighter in sorted order.

    Several mixtures of one variant differ in their layers, and so in their hues.
    """
    pairs = set(cells)
    result = {}
    for variant, (colour, marker) in sorted(looks_of(variant for variant, _ in pairs).items()):
        own = sorted(label for name, label in pairs if name == variant)
        for place, label in enumerate(own):
            apart = len(own) > 1 and family(variant) == MIXTURE
            shade = _colour(ALL_HUES, place) if apart else lighter(colour, 0.6 * place / len(own))
            result[label] = Style(shade, marker, FILLS[place % len(FILLS)])
    return result


def ordered(cells: pd.DataFrame) -> pd.DataFrame:
    """By setting, variant (dense first), length, depth and strategy."""
    ranks = cells.assign(
        later=cells["variant"] != "dense", rank=[strategy_rank(name) for name in cells["activations"]]
    )
    keys = [k for k in (*COMMON, "later", "label", "seq_len", "depth", "rank", "activations") if k in ranks]
    return ranks.sort_values(keys, ignore_index=True).drop(columns=["later", "rank"])
