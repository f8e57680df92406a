"""What is known of a method before it runs: its source, its family, what it claims and what it can do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a variant can do, stated so that nobody has to try."""

    causal: bool
    """Has a form in which no output reads a later token."""
    bidirectional: bool
    """Has a form in which every token may read both sides."""
    stateful: bool = False
    """Carries state from one segment of a sequence to the next."""
    exact: bool = False
    """Equals dense softmax attention over every pair that the objective allows, up to rounding."""
    stochastic: bool = False
    """Draws random numbers in its forward pass (hashing rotations, random features)."""
    fixed_length: bool = False
    """Has parameters whose shape depends on the longest sequence."""


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """The exponents of T in time and memory that the paper claims, and where it does; log T counts 0."""

    time: float
    memory: float
    formula: str
    source: str
    survey: float | None = None
    """The exponent that the survey of Tay et al. gives (arXiv:2009.06732v3, Table 1, "Complexity", which does
    not tell time from memory); None where it does not list the method."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """What is known of a variant before it runs."""

    paper: str
    """Authors, year, title's short form and arXiv number."""
    family: str
    """The kind of method: dense, or one of those of the survey of Tay et al. (arXiv:2009.06732v3, §2.2):
    fixed patterns, learned patterns, low rank, kernels, recurrence, memory."""
    complexity: Complexity
    caps: Caps
