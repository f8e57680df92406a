"""Metadata of a method: source, family, claimed complexity and capabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PositionScheme = Literal["rotary", "sinusoidal", "relative", "learnt", "none"]
"""How a layer encodes positions. rotary: queries and keys are rotated by angles that grow with the position.
sinusoidal: fixed vectors are added to the inputs. relative: scores have terms of the distance. learnt: one
learnt vector for each position. none: the layer does not know positions, but a causal mask tells it their
order."""


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Capabilities of a variant."""

    causal: bool
    """Has a form in which no output depends on a later token."""
    bidirectional: bool
    """Has a form in which every token may read earlier and later tokens."""
    stateful: bool = False
    """Carries state from one segment of a sequence to the next."""
    exact: bool = False
    """Equals dense softmax attention over all pairs that the objective allows, up to rounding."""
    stochastic: bool = False
    """Draws random numbers in its forward pass (hashing rotations, random features)."""
    fixed_length: bool = False
    """Has parameters whose shape depends on the maximum sequence length."""
    few_parameters: bool = False
    """Has far fewer parameters than dense attention of the same width, because the method saves them."""


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """The exponents of T in time and memory that the paper claims; factors of log T count 0."""

    time: float
    memory: float
    formula: str
    source: str
    """Paper and section of the claim."""
    survey: float | None = None
    """The exponent in the survey of Tay et al. (arXiv:2009.06732v3, Table 1, "Complexity", which does not
    distinguish time and memory); None if it does not list the method."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Metadata of a variant."""

    paper: str
    """Authors, year, short title and arXiv number."""
    family: str
    """The family of the method: dense, or a family of the survey of Tay et al. (arXiv:2009.06732v3, §3.1):
    fixed patterns, learned patterns, low rank, kernels, recurrence, memory."""
    complexity: Complexity
    caps: Caps
