"""Attention masks as pure rules: (head, query index, key index) → may the query read the key.

A rule takes three integer tensors that broadcast against each other and returns a bool tensor. Rules combine
with `&`, `|`, `-` (one without the other) and `~`, and compare and hash by value. They know their period: a
shift of the query and the key by that many tokens changes nothing. `variants.ops.tiles` finds from it which
tiles of a mask are empty, without drawing the mask; `matrix` draws it, for oracles and pictures.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HeadRule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(head, query index, key index) → bool, elementwise with broadcasting. Block masks are cached by it, so it
compares by value (a `Rule`), or is a function of a module."""


class Rule(ABC):
    """Base of rules. A subclass is a frozen dataclass of numbers and rules."""

    @property
    def period(self) -> int | None:
        """Tokens by which query and key can be shifted together, in both directions, also below 0, so that
        the rule still gives the same; None where there is no such number."""
        return None

    @property
    def reach(self) -> int | None:
        """The largest distance, in tokens, at which a query may read a key; None: unlimited or not known."""
        return None

    @abstractmethod
    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i of a head may read key j."""

    def __and__(self, other: Rule) -> Rule:
        return Both(self, other)

    def __or__(self, other: Rule) -> Rule:
        return Either(self, other)

    def __sub__(self, other: Rule) -> Rule:
        return Both(self, Not(other))

    def __invert__(self) -> Rule:  # not where a rule is compiled: the compiler knows binary operators alone
        return Not(self)


def common_period(*rules: Rule) -> int | None:
    """A period that all rules have, or None."""
    periods = [rule.period for rule in rules]
    return None if None in periods else math.lcm(*(p for p in periods if p is not None))


def longest_reach(*rules: Rule) -> int | None:
    """The largest reach of several rules; None where one of them has none."""
    reaches = [rule.reach for rule in rules]
    return None if None in reaches else max(r for r in reaches if r is not None)


@dataclass(frozen=True)
class Both(Rule):
    """Keys that both rules allow."""

    one: Rule
    two: Rule

    @property
    def period(self) -> int | None:
        """Of both."""
        return common_period(self.one, self.two)

    @property
    def reach(self) -> int | None:
        """The smaller one."""
        return min((r for r in (self.one.reach, self.two.reach) if r is not None), default=None)

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """And."""
        return self.one(head, i, j) & self.two(head, i, j)


@dataclass(frozen=True)
class Either(Rule):
    """Keys that any of two rules allows."""

    one: Rule
    two: Rule

    @property
    def period(self) -> int | None:
        """Of both."""
        return common_period(self.one, self.two)

    @property
    def reach(self) -> int | None:
        """The larger one."""
        return longest_reach(self.one, self.two)

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Or."""
        return self.one(head, i, j) | self.two(head, i, j)


@dataclass(frozen=True)
class Not(Rule):
    """Keys that a rule forbids."""

    rule: Rule

    @property
    def period(self) -> int | None:
        """The rule's."""
        return self.rule.period

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Not."""
        return ~self.rule(head, i, j)


@dataclass(frozen=True)
class Everything(Rule):
    """Every key."""

    @property
    def period(self) -> int:
        """Any."""
        return 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """True."""
        return i + j == j + i


@dataclass(frozen=True)
class Causal(Rule):
    """No later key."""

    @property
    def period(self) -> int:
        """Any: it asks for a distance."""
        return 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """j ≤ i."""
        return j <= i


@dataclass(frozen=True)
class Window(Rule):
    """Keys less than `size` steps of `dilation` tokens away, on either side: size − 1 neighbours a side."""

    size: int
    dilation: int = 1

    @property
    def period(self) -> int:
        """Any: it asks for a distance."""
        return 1

    @property
    def reach(self) -> int:
        """The farthest neighbour."""
        return max(0, (self.size - 1) * self.dilation)

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """|i − j| < size · dilation, and a multiple of the dilation."""
        distance = (i - j).abs()
        near = distance < self.size * self.dilation
        return near if self.dilation == 1 else near & (distance % self.dilation == 0)


@dataclass(frozen=True)
class SameBlock(Rule):
    """Keys of the query's own block of `length` tokens."""

    length: int

    @property
    def period(self) -> int:
        """One block."""
        return self.length

    @property
    def reach(self) -> int:
        """From one end of a block to the other."""
        return self.length - 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """⌊i / length⌋ = ⌊j / length⌋."""
        return i // self.length == j // self.length


@dataclass(frozen=True)
class SameResidue(Rule):
    """Keys a multiple of `stride` tokens away."""

    stride: int

    @property
    def period(self) -> int:
        """Any: it asks for a distance."""
        return 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """i ≡ j (mod stride)."""
        return (i - j) % self.stride == 0


@dataclass(frozen=True)
class ByHead(Rule):
    """Head h follows rule h mod n."""

    rules: tuple[Rule, ...]

    @property
    def period(self) -> int | None:
        """Of all."""
        return common_period(*self.rules)

    @property
    def reach(self) -> int | None:
        """The longest."""
        return longest_reach(*self.rules)

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Each rule where its heads are."""
        allowed = self.rules[0](head, i, j)
        for n, rule in enumerate(self.rules[1:], 1):
            allowed = torch.where(head % len(self.rules) == n, rule(head, i, j), allowed)
        return allowed


@dataclass(frozen=True)
class HeadSplit(Rule):
    """Heads below `at` follow one rule, the others another one."""

    at: int
    below: Rule
    others: Rule

    @property
    def period(self) -> int | None:
        """Of both."""
        return common_period(self.below, self.others)

    @property
    def reach(self) -> int | None:
        """The longer one."""
        return longest_reach(self.below, self.others)

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Each rule where its heads are."""
        return torch.where(head < self.at, self.below(head, i, j), self.others(head, i, j))


anything, causal = Everything(), Causal()


def depends_on_head(rule: HeadRule) -> bool:
    """Whether a rule asks for the head, so that heads may read different keys."""
    head = torch.arange(2, device="cpu")[:, None, None]
    index = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    return rule(head, index, index).dim() == 3


def by_head(rule: HeadRule, seq_len: int, heads: int) -> Tensor:
    """(H, T, T) bool, or (1, T, T) where all heads read the same: rows are queries, columns are keys."""
    head, index = torch.arange(heads), torch.arange(seq_len)
    allowed = rule(head[:, None, None], index[:, None], index)
    return allowed if allowed.dim() == 3 else allowed[None]


def matrix(rule: HeadRule, seq_len: int) -> Tensor:
    """(T, T) bool of head 0."""
    return by_head(rule, seq_len, 1)[0]


def window_pairs(seq_len: int, size: int, *, is_causal: bool) -> int:
    """How many (query, key) pairs an undilated window allows, in closed form."""
    reach = min(size, seq_len)
    one_sided = reach * (reach + 1) // 2 + (seq_len - reach) * reach
    return one_sided if is_causal else 2 * one_sided - seq_len


def composed(layers: Sequence[Tensor]) -> Tensor:
    """(T, T) bool: which inputs (columns) an output (row) of a stack can depend on.

    `layers` are the masks of its layers, lowest first. Each token also keeps what it holds, as residual
    connections let it. A window of w tokens a side reaches L·(w − 1) tokens back through L layers.
    """
    found = torch.eye(layers[0].shape[-1])
    for allowed in layers:
        found = (found + allowed.float() @ found).clamp(max=1)
    return found > 0
