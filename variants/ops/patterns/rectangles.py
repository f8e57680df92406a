"""Rectangles of (query, key) pairs as plain numbers, and their conversion to parts with masks.

Rectangles are computed once for all tensors. Parts hold masks on the device where attention is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variants.ops.patterns.masks import Rule
from variants.ops.patterns.regions import Region
from variants.ops.patterns.strided_parts import Part, StridedTokens


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """Queries and keys that are computed together, separately for each group; see `Part`."""

    heads: tuple[int, int]
    queries: StridedTokens
    keys: StridedTokens
    causal: bool
    """Whether the n-th query reads the keys up to the n-th only."""
    masked: bool
    """Whether some pairs are forbidden, so that a mask is needed."""

    @property
    def pairs(self) -> int:
        """Number of computed pairs."""
        return Part(heads=self.heads, queries=self.queries, keys=self.keys, causal=self.causal).pairs

    @property
    def numbers(self) -> tuple[int, ...]:
        """All fields as plain numbers, which torch.compile accepts as constants."""
        cuts = self.queries.numbers + self.keys.numbers
        return *self.heads, int(self.causal), int(self.masked), *cuts

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Rectangle:
        """The rectangle with these `numbers`."""
        first, last, causal, masked, *cuts = numbers
        half = len(cuts) // 2
        return cls(
            heads=(first, last),
            queries=StridedTokens.of(cuts[:half]),
            keys=StridedTokens.of(cuts[half:]),
            causal=bool(causal),
            masked=bool(masked),
        )

    def mask(self, rule: Rule, device: torch.device) -> Tensor:
        """(queries, keys) or (heads, queries, keys) bool: the pairs that the rule allows in each group."""
        i, j = self.queries.tokens(device), self.keys.tokens(device)
        return rule(torch.arange(*self.heads, device=device)[:, None, None], i[:, None], j)

    def mask_location(self, other: Rectangle, step: int) -> tuple[slice, slice] | None:
        """The part of the mask of `other` that equals the mask of this rectangle, or None if there is none.

        Valid only for a rule that depends on the distance alone.
        """
        ahead = (self.keys.start - self.queries.start) - (other.keys.start - other.queries.start)
        first = ahead // step
        inside = 0 <= first <= other.keys.length - self.keys.length
        if not inside or self.queries.length > other.queries.length or self.heads != other.heads:
            return None
        return slice(self.queries.length), slice(first, first + self.keys.length)


def to_parts(region: Region, rectangles: Sequence[Rectangle], device: torch.device) -> list[Part]:
    """Convert the rectangles of a region to parts with masks.

    Masks stay in memory until the backward pass. Therefore rectangles at the end of the sequence, which are
    smaller, get a view of the mask of a larger rectangle if the rule depends on the distance alone.
    """
    computed: list[tuple[Rectangle, Tensor]] = []
    parts = []
    for rectangle in rectangles:
        mask = None
        if rectangle.masked:
            for other, larger in computed if region.rule.period == 1 else ():
                location = rectangle.mask_location(other, region.step)
                if location is not None and mask is None:
                    mask = larger[..., location[0], location[1]]
            if mask is None:
                mask = rectangle.mask(region.rule, device)
                computed.append((rectangle, mask))
        parts.append(
            Part(
                heads=rectangle.heads,
                queries=rectangle.queries,
                keys=rectangle.keys,
                causal=rectangle.causal,
                mask=mask,
            )
        )
    return parts
