"""Attention masks as rules: pure functions (head, query index, key index) → may the query read the key.

Over 300 lines: a list of small rules.

A rule takes three integer tensors that broadcast against each other, and returns a bool tensor. Rules are
combined with `&`, `|`, `-` (difference) and `~`. They are compared and hashed by value. The period of a rule
is a number of tokens: shifting query and key by it does not change the result. With it, `tiles`
finds the empty tiles of a mask without computing the mask; `matrix` computes it, for references and figures.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HeadRule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(head, query index, key index) → bool, elementwise with broadcasting. It is the key of a cache of block
masks, so it must be compared by value (a `Rule`) or be a function of a module."""


class Rule(ABC):
    """Base class of rules. A subclass is a frozen dataclass of numbers and rules."""

    @property
    def period(self) -> int | None:
        """A number of tokens by which query and key can be shifted together without changing the result.

        Holds in both directions, also for indices below 0. None: there is no such number.
        """
        return None

    @property
    def reach(self) -> int | None:
        """The largest distance, in tokens, at which a query may read a key; None: unlimited or not known."""
        return None

    def for_head(self, head: int) -> Rule:
        """A rule that gives the same for this head, and may have a shorter period or reach."""
        return self

    @abstractmethod
    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i of a head may read key j."""

    def __and__(self, other: Rule) -> Rule:
        return Both(self, other)

    def __or__(self, other: Rule) -> Rule:
        return Either(self, other)

    def __sub__(self, other: Rule) -> Rule:
        return Both(self, Not(other))

    def __invert__(self) -> Rule:  # not for compiled rules: the compiler supports binary operators only
        return Not(self)


def common_period(*rules: Rule) -> int | None:
    """A period of all rules, or None."""
    periods = [rule.period for rule in rules]
    return None if None in periods else math.lcm(*(p for p in periods if p is not None))


def longest_reach(*rules: Rule) -> int | None:
    """The largest reach of several rules; None if a rule has none."""
    reaches = [rule.reach for rule in rules]
    return None if None in reaches else max(r for r in reaches if r is not None)


@dataclass(frozen=True)
class Both(Rule):
    """Keys that both rules allow."""

    one: Rule
    two: Rule

    @property
    def period(self) -> int | None:
        """A common period of both rules."""
        return common_period(self.one, self.two)

    @property
    def reach(self) -> int | None:
        """The smaller reach."""
        return min((r for r in (self.one.reach, self.two.reach) if r is not None), default=None)

    def for_head(self, head: int) -> Rule:
        """Both rules for this head."""
        return Both(self.one.for_head(head), self.two.for_head(head))

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Logical and."""
        return self.one(head, i, j) & self.two(head, i, j)


@dataclass(frozen=True)
class Either(Rule):
    """Keys that one of two rules allows."""

    one: Rule
    two: Rule

    @property
    def period(self) -> int | None:
        """A common period of both rules."""
        return common_period(self.one, self.two)

    @property
    def reach(self) -> int | None:
        """The larger reach."""
        return longest_reach(self.one, self.two)

    def for_head(self, head: int) -> Rule:
        """Both rules for this head."""
        return Either(self.one.for_head(head), self.two.for_head(head))

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Logical or."""
        return self.one(head, i, j) | self.two(head, i, j)


@dataclass(frozen=True)
class Not(Rule):
    """Keys that a rule forbids."""

    rule: Rule

    @property
    def period(self) -> int | None:
        """The period of the rule."""
        return self.rule.period

    def for_head(self, head: int) -> Rule:
        """The rule for this head."""
        return Not(self.rule.for_head(head))

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Logical not."""
        return ~self.rule(head, i, j)


@dataclass(frozen=True)
class Everything(Rule):
    """Every key."""

    @property
    def period(self) -> int:
        """1: the result is the same everywhere."""
        return 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """True for all pairs."""
        return i + j == j + i


@dataclass(frozen=True)
class Causal(Rule):
    """No later key."""

    @property
    def period(self) -> int:
        """1: the result depends only on the distance."""
        return 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """j ≤ i."""
        return j <= i


@dataclass(frozen=True)
class Window(Rule):
    """Keys at a distance of less than `size` steps of `dilation` tokens, on both sides."""

    size: int
    dilation: int = 1

    @property
    def period(self) -> int:
        """1: the result depends only on the distance."""
        return 1

    @property
    def reach(self) -> int:
        """The distance of the farthest key."""
        return max(0, (self.size - 1) * self.dilation)

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """|i − j| < size · dilation, and |i − j| is a multiple of the dilation."""
        distance = (i - j).abs()
        inside = distance < self.size * self.dilation
        return inside if self.dilation == 1 else inside & (distance % self.dilation == 0)


@dataclass(frozen=True)
class SameBlock(Rule):
    """Keys in the same block of `length` tokens as the query."""

    length: int

    @property
    def period(self) -> int:
        """The length of a block."""
        return self.length

    @property
    def reach(self) -> int:
        """The distance between the ends of a block."""
        return self.length - 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """⌊i / length⌋ = ⌊j / length⌋."""
        return i // self.length == j // self.length


@dataclass(frozen=True)
class SameResidue(Rule):
    """Keys at a distance that is a multiple of `stride` tokens."""

    stride: int

    @property
    def period(self) -> int:
        """1: the result depends only on the distance."""
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
        """A common period of all rules."""
        return common_period(*self.rules)

    @property
    def reach(self) -> int | None:
        """The longest reach."""
        return longest_reach(*self.rules)

    def for_head(self, head: int) -> Rule:
        """The rule of this head."""
        return self.rules[head % len(self.rules)].for_head(head)

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The result of the rule of each head."""
        allowed = self.rules[0](head, i, j)
        for n, rule in enumerate(self.rules[1:], 1):
            allowed = torch.where(head % len(self.rules) == n, rule(head, i, j), allowed)
        return allowed


@dataclass(frozen=True)
class HeadSplit(Rule):
    """Heads below `at` follow the rule `below`, all other heads the rule `others`."""

    at: int
    below: Rule
    others: Rule

    @property
    def period(self) -> int | None:
        """A common period of both rules."""
        return common_period(self.below, self.others)

    @property
    def reach(self) -> int | None:
        """The longer reach."""
        return longest_reach(self.below, self.others)

    def for_head(self, head: int) -> Rule:
        """The rule of this head."""
        return (self.below if head < self.at else self.others).for_head(head)

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The result of the rule of each head."""
        return torch.where(head < self.at, self.below(head, i, j), self.others(head, i, j))


@dataclass(frozen=True)
class AnyOfGroup(Rule):
    """Keys that any head of a group reads: head h stands for the heads h·size … h·size + size − 1."""

    rule: Rule
    size: int

    @property
    def period(self) -> int | None:
        """The period of the rule."""
        return self.rule.period

    @property
    def reach(self) -> int | None:
        """The reach of the rule."""
        return self.rule.reach

    def for_head(self, head: int) -> Rule:
        """The rule that all heads of a group have in common, if there is one."""
        first, *others = self._rules(head)
        return self if others or depends_on_head(first) else first

    def is_common(self, head: int) -> bool:
        """Whether all heads of a group read the same keys."""
        return self.for_head(head) is not self

    def _rules(self, head: int) -> list[Rule]:
        return list(dict.fromkeys(self.rule.for_head(head * self.size + n) for n in range(self.size)))

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether one of the heads may read the key."""
        allowed = self.rule(head * self.size, i, j)
        for n in range(1, self.size):
            allowed = allowed | self.rule(head * self.size + n, i, j)
        return allowed


all_keys, causal = Everything(), Causal()


def depends_on_head(rule: HeadRule) -> bool:
    """Whether a rule depends on the head, so that heads may read different keys."""
    head = torch.arange(2, device="cpu")[:, None, None]
    index = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    return rule(head, index, index).dim() == 3


def by_head(rule: HeadRule, seq_len: int, heads: int) -> Tensor:
    """(H, T, T) bool, or (1, T, T) if all heads read the same keys. Rows are queries, columns are keys."""
    head, index = torch.arange(heads), torch.arange(seq_len)
    allowed = rule(head[:, None, None], index[:, None], index)
    return allowed if allowed.dim() == 3 else allowed[None]


def matrix(rule: HeadRule, seq_len: int) -> Tensor:
    """(T, T) bool: the mask of head 0. Rows are queries, columns are keys."""
    return by_head(rule, seq_len, 1)[0]


def composed(layers: Sequence[Tensor]) -> Tensor:
    """(T, T) bool: the inputs (columns) on which each output (row) of a stack of layers can depend.

    `layers` are the masks (T, T) of the layers, lowest first. Residual connections are included: each token
    also depends on itself. A window of w tokens on each side reaches L·(w − 1) tokens through L layers.
    """
    reachable = torch.eye(layers[0].shape[-1])
    for allowed in layers:
        reachable = (reachable + allowed.float() @ reachable).clamp(max=1)
    return reachable > 0
