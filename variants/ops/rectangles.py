"""Rectangles of (query, key) pairs as plain numbers, and the parts with masks that are made of them.

Numbers are found once, for any tensors; parts hold masks on the device where attention is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variants.ops.masks import Rule
from variants.ops.regions import Region
from variants.ops.strided_parts import Cut, Part


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """Queries and keys that are computed together, for each group by itself; see `Part`."""

    heads: tuple[int, int]
    queries: Cut
    keys: Cut
    causal: bool
    """The n-th query reads keys up to the n-th."""
    masked: bool
    """Not every pair is allowed, so that the rule is asked."""

    @property
    def pairs(self) -> int:
        """Pairs that are computed."""
        return Part(heads=self.heads, queries=self.queries, keys=self.keys, causal=self.causal).pairs

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of it as plain numbers, which the compiler takes as constants."""
        cuts = self.queries.numbers + self.keys.numbers
        return *self.heads, int(self.causal), int(self.masked), *cuts

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Rectangle:
        """The rectangle with these numbers."""
        first, last, causal, masked, *cuts = numbers
        half = len(cuts) // 2
        return cls(
            heads=(first, last),
            queries=Cut.of(cuts[:half]),
            keys=Cut.of(cuts[half:]),
            causal=bool(causal),
            masked=bool(masked),
        )

    def mask(self, rule: Rule, device: torch.device) -> Tensor:
        """(queries, keys) or (heads, queries, keys) bool: what the rule allows in the first group, and in
        every other."""
        i, j = self.queries.tokens(device), self.keys.tokens(device)
        return rule(torch.arange(*self.heads, device=device)[:, None, None], i[:, None], j)

    def within(self, other: Rectangle, step: int) -> tuple[slice, slice] | None:
        """Where this one's mask lies in another's if distances alone decide what is allowed, or None."""
        ahead = (self.keys.start - self.queries.start) - (other.keys.start - other.queries.start)
        first = ahead // step
        inside = 0 <= first <= other.keys.length - self.keys.length
        if not inside or self.queries.length > other.queries.length or self.heads != other.heads:
            return None
        return slice(self.queries.length), slice(first, first + self.keys.length)


def parts_of(region: Region, found: Sequence[Rectangle], device: torch.device) -> list[Part]:
    """Rectangles of a region with their masks.

    Masks are kept for the backward pass, so tiles that the end of a sequence cuts short are given a view of a
    whole one's mask if distances alone decide.
    """
    drawn: list[tuple[Rectangle, Tensor]] = []
    parts = []
    for rectangle in found:
        mask = None
        if rectangle.masked:
            for other, whole in drawn if region.rule.period == 1 else ():
                where = rectangle.within(other, region.step)
                if where is not None and mask is None:
                    mask = whole[..., where[0], where[1]]
            if mask is None:
                mask = rectangle.mask(region.rule, device)
                drawn.append((rectangle, mask))
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
