"""Regions of a mask: a rule, with an order of the tokens in which the allowed pairs are contiguous.

With step s, the tokens r, r + s, r + 2s, … of each residue r are contiguous, and only tokens with the same
residue read each other: strided columns become diagonal blocks. Indices within a residue are called local.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from variants.ops.patterns.masks import HeadRule, Rule, depends_on_head
from variants.ops.patterns.strided_parts import StridedTokens


@dataclass(frozen=True, kw_only=True)
class Region:
    """The pairs that `rule` allows among tokens whose distance is a multiple of `step`."""

    rule: Rule
    heads: tuple[int, int]
    """The region belongs to heads [first, last)."""
    step: int = 1
    first: int = 0
    """The first token of the region."""


@dataclass(frozen=True, kw_only=True)
class Residue:
    """`width` sequences of `length` tokens: first + n, first + n + step, … for 0 ≤ n < width."""

    first: int
    width: int
    length: int
    step: int

    def cut(self, start: int, count: int, groups: int = 1, apart: int = 0) -> StridedTokens:
        """Tokens [start, start + count) of a sequence, in `groups` groups, each shifted by `apart` tokens."""
        begin, apart = self.first + start * self.step, apart * self.step
        if self.width > 1:
            groups, apart = self.width, 1
        if self.step == 1:
            return StridedTokens(start=begin, groups=groups, group_step=apart, run=count)
        return StridedTokens(start=begin, groups=groups, group_step=apart, rows=count, row_step=self.step)

    def sequences(self) -> Iterator[Residue]:
        """The sequences, each as a residue of width 1."""
        for n in range(self.width):
            yield Residue(first=self.first + n, width=1, length=self.length, step=self.step)

    def allows(self, rule: HeadRule, head: int, i: Tensor, j: Tensor) -> Tensor:
        """Evaluate the rule for the local indices i (queries) and j (keys)."""
        head_index = torch.tensor(head, device="cpu")
        return rule(head_index, self.first + i * self.step, self.first + j * self.step)


def residues(region: Region, seq_len: int) -> Iterator[Residue]:
    """The sequences into which a region orders the tokens; equal ones are joined to one residue."""
    tokens = seq_len - region.first
    if tokens <= 0:
        return
    step = min(region.step, tokens)
    rows, longer = divmod(tokens, step)
    for first, width, length in ((0, longer, rows + 1), (longer, step - longer, rows)):
        if width:
            residue = Residue(first=region.first + first, width=width, length=length, step=region.step)
            yield from [residue] if region.rule.period == 1 else residue.sequences()


def local_period(rule: Rule, step: int) -> int | None:
    """The period of a rule in local indices, or None."""
    return None if rule.period is None else rule.period // math.gcd(rule.period, step)


def head_groups(rule: Rule, first: int, last: int) -> list[tuple[int, int]]:
    """Groups of heads that read the same keys: all heads if the rule does not depend on the head, else one
    group for each head."""
    if not depends_on_head(rule):
        return [(first, last)]
    return [(head, head + 1) for head in range(first, last)]
