"""Regions of a mask: a rule, and the order of the tokens in which its allowed pairs are contiguous.

With step s, the tokens r, r + s, r + 2s, … of each residue r stand side by side, and only tokens of the same
residue meet: strided columns become diagonal blocks. Indices within a residue are called local here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from variants.ops.masks import HeadRule, Rule, depends_on_head
from variants.ops.strided_parts import Cut


@dataclass(frozen=True, kw_only=True)
class Region:
    """The pairs that `rule` allows among tokens a multiple of `step` apart."""

    rule: Rule
    heads: tuple[int, int]
    """The region is of heads [first, last)."""
    step: int = 1
    first: int = 0
    """Earlier tokens are not in the region."""


@dataclass(frozen=True, kw_only=True)
class Residue:
    """`width` sequences of `length` tokens: first + n, first + n + step, … for n below the width."""

    first: int
    width: int
    length: int
    step: int

    def cut(self, start: int, count: int, groups: int = 1, apart: int = 0) -> Cut:
        """Tokens [start, start + count) of a sequence, and of `groups` − 1 more, each `apart` further on."""
        begin, apart = self.first + start * self.step, apart * self.step
        if self.width > 1:
            groups, apart = self.width, 1
        if self.step == 1:
            return Cut(start=begin, groups=groups, group_step=apart, run=count)
        return Cut(start=begin, groups=groups, group_step=apart, rows=count, row_step=self.step)

    def each(self) -> Iterator[Residue]:
        """The sequences one by one."""
        for n in range(self.width):
            yield Residue(first=self.first + n, width=1, length=self.length, step=self.step)

    def asks(self, rule: HeadRule, head: int, i: Tensor, j: Tensor) -> Tensor:
        """The rule for tokens i and j of the sequence."""
        given = torch.tensor(head, device="cpu")
        return rule(given, self.first + i * self.step, self.first + j * self.step)


def residues(region: Region, seq_len: int) -> Iterator[Residue]:
    """The sequences that a region's order makes; those that are alike as one."""
    tokens = seq_len - region.first
    if tokens <= 0:
        return
    step = min(region.step, tokens)
    rows, longer = divmod(tokens, step)
    for first, width, length in ((0, longer, rows + 1), (longer, step - longer, rows)):
        if width:
            residue = Residue(first=region.first + first, width=width, length=length, step=region.step)
            yield from [residue] if region.rule.period == 1 else residue.each()


def local_period(rule: Rule, step: int) -> int | None:
    """The period in tokens of one residue."""
    return None if rule.period is None else rule.period // math.gcd(rule.period, step)


def alike_heads(rule: Rule, first: int, last: int) -> list[tuple[int, int]]:
    """Runs of heads that read the same: all where the rule does not ask for the head, else one each."""
    if not depends_on_head(rule):
        return [(first, last)]
    return [(head, head + 1) for head in range(first, last)]
