"""The colour and marker of each variant, the same in every figure and experiment.

The colours can be distinguished with the common colour-vision deficiencies as far as colours alone allow;
where a dozen variants meet, the marker decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from matplotlib.colors import to_hex, to_rgb

from bench.report.data.groups import COMMON

Fill = Literal["full", "left", "bottom", "right", "top"]

# Fixed by name, so that a variant looks the same beside any other variants.
KNOWN: dict[str, tuple[str, str]] = {
    "dense": ("#000000", "o"),
    "chunked": ("#E69F00", "s"),
    "overlapping": ("#0072B2", "D"),
    "longformer": ("#009E73", "^"),
    "sparse_strided": ("#CC79A7", "v"),
    "sparse_fixed": ("#882255", "<"),
    "transformer_xl": ("#56B4E9", ">"),
    "compressive": ("#332288", "p"),
    "reformer": ("#D55E00", "P"),
    "routing": ("#999933", "X"),
    "linformer": ("#888888", "h"),
    "performer": ("#7F4F24", "*"),
}
OTHERS: tuple[tuple[str, str], ...] = (
    ("#AA4499", "8"),
    ("#117733", "d"),
    ("#CC6677", "H"),
    ("#4477AA", "s"),
    ("#DDCC77", "^"),
    ("#66CCEE", "v"),
    ("#BB2244", "D"),
)
# Ways of saving activations, in the order in which tables and figures have them.
STRATEGIES: dict[str, tuple[str, str]] = {
    "keep": ("#000000", "o"),
    "checkpoint": ("#0072B2", "s"),
    "sqrt": ("#56B4E9", "D"),
    "selective": ("#009E73", "^"),
    "reversible": ("#D55E00", "v"),
    "offload": ("#CC79A7", "P"),
}
FILLS: tuple[Fill, ...] = ("full", "left", "bottom", "right", "top")


@dataclass(frozen=True)
class Style:
    """A colour as #rrggbb, a matplotlib marker and how it is filled."""

    colour: str
    marker: str
    fill: Fill


def looks(variant: str, variants: Iterable[str]) -> tuple[str, str]:
    """Colour and marker of a variant; a variant without a fixed colour takes its place among the other such
    ones.

    This place is by sorted name, so it depends only on which of them an experiment has.
    """
    if variant in KNOWN:
        return KNOWN[variant]
    unknown = sorted(set(variants) - set(KNOWN))
    return OTHERS[unknown.index(variant) % len(OTHERS)]


def variant_rank(variant: str) -> int:
    """Its place among the variants, related ones side by side; those without a fixed colour come last."""
    known = list(KNOWN)
    return known.index(variant) if variant in known else len(known)


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
        colour, marker = STRATEGIES.get(name) or OTHERS[unknown.index(name) % len(OTHERS)]
        result[name] = Style(colour, marker, "full")
    return result


def lighter(colour: str, share: float) -> str:
    """The colour, that share of the way to white."""
    red, green, blue = (c + (1 - c) * share for c in to_rgb(colour))
    return to_hex((red, green, blue))


def styles(cells: Iterable[tuple[str, str]]) -> dict[str, Style]:
    """Label → style for (variant, label) pairs; a variant's labels go lighter in sorted order."""
    pairs = set(cells)
    variants = {variant for variant, _ in pairs}
    result = {}
    for variant in sorted(variants):
        colour, marker = looks(variant, variants)
        own = sorted(label for name, label in pairs if name == variant)
        for place, label in enumerate(own):
            share = 0.6 * place / len(own)
            result[label] = Style(lighter(colour, share), marker, FILLS[place % len(FILLS)])
    return result


def ordered(cells: pd.DataFrame) -> pd.DataFrame:
    """By setting, variant (dense first), length, depth and strategy."""
    ranks = cells.assign(
        later=cells["variant"] != "dense", rank=[strategy_rank(name) for name in cells["activations"]]
    )
    keys = [k for k in (*COMMON, "later", "label", "seq_len", "depth", "rank", "activations") if k in ranks]
    return ranks.sort_values(keys, ignore_index=True).drop(columns=["later", "rank"])
