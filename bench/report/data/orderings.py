"""Orderings that must appear before models are ranked: without them, ranks say nothing about long context.

`ORDERINGS` is the list. Each entry finds the cells that it compares by what they declare, among the cells of
one pool, which share data, size, length and budget. A mixture whose layers are all equal is a model of that
layer's variant. An ordering without such cells is not measured and demands nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.report.data.layers import layers_of, name_of, params_of

Row = dict[str, Any]
"""A cell of the pool: `number`, `variant`, `label`, `seq_len`, `depth`, `variant_params`, `state_bytes`,
`has_reset`."""

NOT_WORSE = 0.01
"""Share of the loss by which a model that is "not worse" may be worse."""
NEAR = 0.02
"""The same for a model that is "near" another one."""
EQUAL_STATE = 0.05
"""Relative difference of the bytes of two states that count as equal."""
SHORT = 4
"""A window is short if this many of it fit into a sequence."""


@dataclass(frozen=True)
class Expected:
    """A model whose loss is lower than another's, or higher by less than the margin: a share of the other's
    loss. `reset`: the other is the same model, with its state fresh in every window."""

    first: int
    second: int
    words: str
    margin: float = 0.0
    reset: bool = False


@dataclass(frozen=True)
class Ordering:
    """A name and why it is expected, and the pairs of cells of a pool in which it must appear."""

    name: str
    why: str
    pairs: Callable[[Sequence[Row]], Iterator[Expected]]


def _by_more(margin: float) -> str:
    return f" by more than {100 * margin:g} %"


def _of(cells: Sequence[Row], variant: str) -> list[Row]:
    return [cell for cell in cells if cell["variant"] == variant]


def _memory(variant: str) -> Callable[[Sequence[Row]], Iterator[Expected]]:
    """The same trained model with its memory carried over documents, and fresh in every window: no model
    without memory needs to be trained for it, and the replicate's spread cancels."""

    def pairs(cells: Sequence[Row]) -> Iterator[Expected]:
        for cell in _of(cells, variant):
            if cell["has_reset"]:
                words = f"{cell['label']} better with its memory than with a fresh one in every window"
                yield Expected(cell["number"], cell["number"], words, reset=True)

    return pairs


def _equal_state(variant: str, other: str) -> Callable[[Sequence[Row]], Iterator[Expected]]:
    """Models of two variants whose states take as many bytes."""

    def pairs(cells: Sequence[Row]) -> Iterator[Expected]:
        for first in _of(cells, variant):
            for second in _of(cells, other):
                sizes = first["state_bytes"], second["state_bytes"]
                if abs(sizes[0] - sizes[1]) <= EQUAL_STATE * max(sizes):  # False for NaN
                    words = f"{first['label']} not worse than {second['label']}{_by_more(NOT_WORSE)}"
                    yield Expected(first["number"], second["number"], words, NOT_WORSE)

    return pairs


def _window(cell: Row) -> int | None:
    """The window of a cell in tokens, if all layers and heads have the same and nothing else is read."""
    params = cell["variant_params"]
    windows, dilations = (
        {*value} if isinstance(value, list | tuple) else {value}
        for value in (params.get("window"), params.get("dilation", 1))
    )
    if len(windows) != 1 or None in windows or dilations != {1} or params.get("global_tokens", 0):
        return None
    (window,) = windows
    return int(window) if window < cell["seq_len"] else None


def _longer_is_better(full: str, windowed: str) -> Callable[[Sequence[Row]], Iterator[Expected]]:
    """Full attention, then windows from the longest to the shortest; full attention is better than the
    shortest one, if that is short."""

    def pairs(cells: Sequence[Row]) -> Iterator[Expected]:
        by_window = {
            _window(cell): cell for cell in reversed(_of(cells, windowed))
        }  # the first of equal ones
        chain = [by_window[window] for window in sorted((w for w in by_window if w), reverse=True)]
        for dense in _of(cells, full)[:1] if chain else ():
            shortest = min(window for window in by_window if window)
            short = shortest * SHORT <= dense["seq_len"]
            if short:
                words = f"{dense['label']} better than a window of {shortest} tokens"
                yield Expected(dense["number"], chain[-1]["number"], words)
            for longer, shorter in pairwise((dense, *chain)):
                if short and (longer, shorter) == (dense, chain[-1]):
                    continue
                name = longer["label"] if longer is dense else f"a window of {_window(longer)} tokens"
                words = f"{name} not worse than a window of {_window(shorter)}{_by_more(NOT_WORSE)}"
                yield Expected(longer["number"], shorter["number"], words, NOT_WORSE)

    return pairs


def _mixture(mixture: str, full: str, every: int) -> Callable[[Sequence[Row]], Iterator[Expected]]:
    """Mixtures in which one of so many layers has full attention."""

    def pairs(cells: Sequence[Row]) -> Iterator[Expected]:
        for cell in _of(cells, mixture):
            own = [name_of(layer) for layer in layers_of(cell["variant_params"], int(cell["depth"]))]
            if every * own.count(full) != len(own):
                continue
            for dense in _of(cells, full)[:1]:
                words = f"{cell['label']} not worse than {dense['label']}{_by_more(NEAR)}"
                yield Expected(cell["number"], dense["number"], words, NEAR)

    return pairs


ORDERINGS = (
    Ordering(
        "memory helps", "a recurrent memory that does not help was not learnt", _memory("transformer_xl")
    ),
    Ordering(
        "compressed memory is not worse",
        "at an equal state it reaches further back",
        _equal_state("compressive", "transformer_xl"),
    ),
    Ordering(
        "longer windows are better",
        "text has long repetitions; a model that does better without them has learnt local statistics only",
        _longer_is_better("dense", "longformer"),
    ),
    Ordering(
        "a mixture is near dense",
        "one full layer in four reads the whole context",
        _mixture("hybrid", "dense", 4),
    ),
)


def expected(cells: Sequence[Row]) -> list[tuple[Ordering, Expected]]:
    """The orderings that a pool can show, with the cells that must show them."""
    models = sorted(map(_as_layer, cells), key=lambda cell: "layers" in cell)  # mixtures last
    return [(ordering, pair) for ordering in ORDERINGS for pair in ordering.pairs(models)]


def _as_layer(cell: Row) -> Row:
    """The cell; of a mixture whose layers are all equal, as one of that layer's variant."""
    layers = layers_of(cell["variant_params"], int(cell["depth"]))
    if len({*layers}) != 1:
        return cell
    return {**cell, "variant": name_of(layers[0]), "variant_params": params_of(layers[0]), "layers": layers}


SHOWN, VIOLATED, UNDECIDED = "shown", "violated", "not decided"


def verdict(low: float, high: float, margin: float) -> str:
    """What the interval of first − second says of "the first is lower, or higher by less than the margin"."""
    if math.isnan(low) or math.isnan(high):
        return UNDECIDED
    return SHOWN if high < margin else VIOLATED if low > margin else UNDECIDED
