"""ListOps: the value of a nested expression of lists, asked for at its end.

Shapes: B batch, T tokens.

    inputs   _ _ _ _ [MAX 2 9 [MIN 4 7 ] 0 ] =      targets   · · · … · 9      (· is not scored)
             padding                  the question

Nangia 2018 (arXiv:1804.06028) with the sizes of Long Range Arena (Tay 2020, arXiv:2011.04006, §2.2.1):
digits, brackets, and the maximum, minimum, median (of an even number the mean of the middle two, rounded
down) and sum modulo 10 of 2 to `max_args` arguments, each an operator itself with probability `growth`
until `max_depth`. Expressions of other than the wanted lengths are drawn again.

Deviations: expressions stand flush right, behind padding and before a symbol that asks, so that the last
token is the question to causal and bidirectional models alike (LRA pads behind and asks in front);
brackets are tokens (LRA's tokeniser drops them); and training draws new expressions all the time, none of
them in the test (LRA has 96,000).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.signal import fftconvolve

from bench.tasks.base import IGNORED, Batch, Setting, Task, TaskConfig

Ints = npt.NDArray[np.int64]
Example = tuple[Ints, int]
"""Tokens (T,) and the answer."""

DIGITS = 10
MAX, MIN, MED, SM, END, PADDING, QUESTION = range(DIGITS, 17)
"""Tokens after the digits, which stand for themselves."""
SHORTEST = 16
"""Shorter expressions are too few: a test could hold most of them, and training has to avoid those."""
LONGEST = 2**16
"""Tokens up to which the chance of a length is worked out."""
RAREST = 1e-3
"""Lengths that fewer of the expressions have are refused, as nearly all draws would be thrown away."""
POOL_TOKENS = 2**20
"""At most about so many are drawn at a time."""
TESTS_AT_A_TIME = 64
"""A number of its own, so that a test does not depend on the batch size."""


@dataclass(frozen=True, kw_only=True)
class ListopsConfig(TaskConfig):
    """Knobs of ListOps; the defaults are Long Range Arena's, lengths aside, which follow the cell's."""

    min_length: int | None = None
    """Fewest tokens of an expression, its brackets included; null: a quarter of max_length. LRA has 501."""
    max_length: int | None = None
    """Most tokens of an expression; null: seq_len less the question. LRA has 1,999."""
    max_depth: int = 10
    """Levels of the tree, the digits at the bottom included."""
    max_args: int = 10
    """Most arguments of an operator; the fewest are 2, and every number is as likely."""
    growth: float = 0.25
    """Probability that an argument is an operator itself."""

    def __post_init__(self) -> None:
        least = self.min_length
        self.require("min_length", least is None or least >= SHORTEST, f"{SHORTEST} tokens or more, or null")
        at_least = SHORTEST if least is None else least
        allowed = f"min_length or more, and {SHORTEST}, up to {LONGEST:,} tokens; or null"
        fits = self.max_length is None or at_least <= self.max_length <= LONGEST
        self.require("max_length", fits, allowed)
        self.require("max_depth", self.max_depth >= 2, "2 or more")
        self.require("max_args", self.max_args >= 2, "2 or more")
        self.require("growth", 0 <= self.growth < 1, "0 up to below 1")

    @property
    def vocabulary(self) -> int:
        """Digits, operators, a closing bracket, padding and the question."""
        return QUESTION + 1

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """The fewest and the most tokens of an expression in a sequence of `seq_len`."""
        most = seq_len - 1 if self.max_length is None else self.max_length
        return max(SHORTEST, most // 4) if self.min_length is None else self.min_length, most


@lru_cache(maxsize=8)
def length_chances(config: ListopsConfig, longest: int) -> npt.NDArray[np.float64]:
    """(longest + 1,): the probability of each length of an expression whose root is an operator.

    A tree's length is 2 and its arguments' lengths, so from the deepest level up the chances of a list of n
    arguments are those of one convolved n times.
    """
    argument = np.zeros(longest + 1)
    argument[1] = 1.0  # at the deepest level, a digit
    for _ in range(config.max_depth - 1):
        several = argument  # P + P² + …, by Horner's rule
        for _ in range(config.max_args - 2):
            several = argument + fftconvolve(argument, several)[: longest + 1]
        lists = fftconvolve(argument, several)[: longest + 1] / (config.max_args - 1)
        root = np.concatenate([[0.0, 0.0], lists[:-2]])
        argument = config.growth * root
        argument[1] += 1 - config.growth
    return root


class Level(NamedTuple):
    """One level of many trees at once, from left to right; a node's arguments lie together on the next.

    tree (n,): whose node it is. arity (n,): how many arguments it has; 0 is a digit.
    """

    tree: Ints
    arity: Ints

    def of(self, kept: npt.NDArray[np.bool_]) -> Level:
        """The nodes of the trees that are kept, trees numbered anew."""
        here = kept[self.tree]
        return Level((np.cumsum(kept) - 1)[self.tree[here]], self.arity[here])

    @property
    def first(self) -> Ints:
        """Where on the next level the arguments of each operator begin."""
        arity = self.arity[self.arity > 0]
        return np.cumsum(arity) - arity


def grow(generator: np.random.Generator, config: ListopsConfig, trees: int, longest: int) -> list[Level]:
    """The shapes of `trees` trees with an operator at the root; those past `longest` tokens stop growing."""
    tree, operator = np.arange(trees), np.ones(trees, dtype=np.bool_)
    length, levels = np.zeros(trees, dtype=np.int64), []
    for depth in range(1, config.max_depth + 1):
        arity = np.where(operator, generator.integers(2, config.max_args + 1, len(tree)), 0)
        levels.append(Level(tree, arity))
        length += np.bincount(tree, 1 + operator, trees).astype(np.int64)
        tree = tree.repeat(arity)
        if not len(tree):
            break
        grows = config.growth if depth + 1 < config.max_depth else 0.0
        operator = (generator.random(len(tree)) < grows) & (length[tree] <= longest)
    return levels


def sizes(levels: list[Level]) -> list[Ints]:
    """Tokens of the expression under each node, level by level."""
    found, below = [], np.empty(0, dtype=np.int64)
    for level in reversed(levels):
        size = np.ones(len(level.tree), dtype=np.int64)
        if len(level.first):
            size[level.arity > 0] = 2 + np.add.reduceat(below, level.first)
        found.append(below := size)
    return found[::-1]


def evaluate(operator: Ints, arguments: Ints, first: Ints, arity: Ints) -> Ints:
    """(n,) values of n operators; the arguments of each begin at `first` and are `arity`."""
    ordered = arguments[np.lexsort((arguments, np.arange(len(first)).repeat(arity)))]
    return np.choose(
        operator - MAX,
        [
            np.maximum.reduceat(arguments, first),
            np.minimum.reduceat(arguments, first),
            (ordered[first + (arity - 1) // 2] + ordered[first + arity // 2]) // 2,
            np.add.reduceat(arguments, first) % 10,
        ],
    )


def fill(generator: np.random.Generator, levels: list[Level], seq_len: int) -> tuple[Ints, Ints]:
    """Trees with symbols drawn for their nodes: tokens (N, T), the question included, and answers (N,)."""
    size = sizes(levels)
    tokens = np.full((len(size[0]), seq_len), PADDING)
    tokens[:, -1] = QUESTION
    symbols, place = [], seq_len - 1 - size[0]
    for depth, level in enumerate(levels):
        operator = level.arity > 0
        symbol = generator.integers(0, DIGITS, len(operator))
        symbol[operator] = generator.integers(MAX, SM + 1, int(operator.sum()))
        symbols.append(symbol)
        tokens[level.tree, place] = symbol
        tokens[level.tree[operator], (place + size[depth] - 1)[operator]] = END
        if operator.any():
            before = np.cumsum(size[depth + 1]) - size[depth + 1]  # tokens of all that lies left on the level
            shift = place[operator] + 1 - before[level.first]
            place = shift.repeat(level.arity[operator]) + before
    values = np.empty(0, dtype=np.int64)
    for level, symbol in zip(reversed(levels), reversed(symbols), strict=True):
        operator, value = level.arity > 0, symbol
        if operator.any():
            value[operator] = evaluate(symbol[operator], values, level.first, level.arity[operator])
        values = value
    return tokens, values


class Listops(Task):
    """Ten classes, asked for at the last token."""

    Config = ListopsConfig
    config: ListopsConfig
    objectives = ("listops",)

    def __init__(self, config: ListopsConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.shortest, self.longest = config.lengths(setting.seq_len)

    def unsupported(self) -> str | None:
        """No room for the lengths, or hardly an expression of such lengths."""
        most, config = min(self.setting.seq_len - 1, LONGEST), self.config
        lengths = f"expressions of {self.shortest:,} to {self.longest:,} tokens"
        if not self.shortest <= self.longest <= most:
            return (
                f"seq_len={self.setting.seq_len:,}: data=listops asks for {lengths}; allowed are {SHORTEST} "
                f"to {most:,}, seq_len less the question and at most {LONGEST:,}"
            )
        if self.chance < RAREST:
            return (
                f"data=listops: max_depth={config.max_depth}, max_args={config.max_args} and "
                f"growth={config.growth} make {lengths} less than once in {1 / RAREST:,.0f} times"
            )
        return None

    @property
    def chance(self) -> float:
        """The share of the expressions with an operator at the root whose length is a wanted one."""
        return max(0.0, float(length_chances(self.config, self.longest)[self.shortest :].sum()))

    @cached_property
    def guess_accuracy(self) -> float:  # type: ignore[override]  # worked out when it is asked for
        """Of always naming the answer that the test has most."""
        answers = [answer for _, answer in self._test.values()]
        return max(map(answers.count, answers)) / len(answers)

    def train_batch(self, step: int, done: float) -> Batch:
        """Expressions that are not in the test."""
        size, found = self.setting.batch_size, []
        for tokens, answer in self._draw(self.train_generator(step), size):
            if tokens.tobytes() not in self._test:
                found.append((tokens, answer))
                if len(found) == size:
                    break
        return self._batch(found)

    def test_batches(self) -> Iterator[Batch]:
        """Expressions that all differ."""
        found = list(self._test.values())
        for start in range(0, len(found), self.setting.batch_size):
            yield self._batch(found[start : start + self.setting.batch_size])

    @cached_property
    def _test(self) -> dict[bytes, Example]:
        """The tests by their tokens."""
        found: dict[bytes, Example] = {}
        for tokens, answer in self._draw(self.test_generator(0), TESTS_AT_A_TIME):
            found[tokens.tobytes()] = tokens, answer
            if len(found) >= self.setting.test_tokens // self.setting.seq_len:
                break
        return found

    def _draw(self, generator: np.random.Generator, at_a_time: int) -> Iterator[Example]:
        """Expressions without end, about so many drawn together."""
        trees = min(math.ceil(at_a_time / self.chance), max(1, POOL_TOKENS // self.longest))
        while True:
            levels = grow(generator, self.config, trees, self.longest)
            size = sizes(levels)[0]
            kept = (self.shortest <= size) & (size <= self.longest)
            if not kept.any():
                continue
            levels = [found for level in levels if len((found := level.of(kept)).tree)]
            yield from zip(*fill(generator, levels, self.setting.seq_len), strict=True)

    @staticmethod
    def _batch(examples: list[Example]) -> Batch:
        inputs = np.stack([tokens for tokens, _ in examples])
        targets = np.full_like(inputs, IGNORED)
        targets[:, -1] = [answer for _, answer in examples]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
