"""ListOps: predict the value of a nested list expression at its end.

Shapes: B batch, T tokens.

    inputs   _ _ _ _ [MAX 2 9 [MIN 4 7 ] 0 ] =      targets   · · · … · 9      (· is not scored)
             padding                  the question

After Nangia 2018 (arXiv:1804.06028), with the sizes of Long Range Arena (Tay 2020, arXiv:2011.04006, §2.2.1).
Expressions consist of digits, brackets and the operators maximum, minimum, median and sum modulo 10. The
median of an even number of arguments is the mean of the middle two, rounded down. An operator has 2 to
`max_args` arguments; each argument is itself an operator with probability `growth`, down to `max_depth`.
Expressions outside the requested range of lengths are rejected and drawn again.

Deviations from Long Range Arena (LRA): expressions are right-aligned, after the padding and before a question
token, so that the last token is the question for causal and bidirectional models (LRA pads on the right and
asks at the front). Brackets are tokens (LRA's tokenizer removes them). Training always draws new expressions,
which never occur in the test (LRA has 96,000 fixed ones).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.signal import fftconvolve

from bench.tasks.base import IGNORED, Batch, Setting, Task, TaskConfig
from variants.knobs import knob

Ints = npt.NDArray[np.int64]
Example = tuple[Ints, int]
"""Tokens (T,) and the answer."""

DIGITS = 10
MAX, MIN, MED, SM, END, PADDING, QUESTION = range(DIGITS, 17)
"""The tokens after the digits; the token of a digit is the digit itself."""
MIN_LENGTH = 16
"""Minimum length. There are too few shorter expressions: the test could contain most of them, and training
must avoid test expressions."""
MAX_LENGTH = 65_536
"""Maximum length, in tokens, for which the length distribution is computed."""
MIN_PROBABILITY = 1e-3
"""Minimum probability of the requested lengths. If it is lower, nearly all draws would be rejected, so the
setting is unsupported."""
POOL_TOKENS = 2**20
"""Approximate maximum number of tokens drawn at a time."""
TESTS_AT_A_TIME = 64
"""A constant, so that the test does not depend on the batch size."""


@dataclass(frozen=True, kw_only=True)
class ListopsConfig(TaskConfig):
    """Knobs of ListOps. The defaults are those of Long Range Arena,
    except the lengths, which depend on the cell's."""

    min_length: int | None = knob(None, least=MIN_LENGTH, unit="tokens")
    """Minimum tokens of an expression, including brackets; null is a quarter of max_length. LRA uses 501."""
    max_length: int | None = knob(None, least=MIN_LENGTH, most=MAX_LENGTH, unit="tokens")
    """Maximum tokens of an expression; null is seq_len minus the question token. LRA uses 1,999."""
    max_depth: int = knob(10, least=2, unit="levels")
    """Levels of the expression tree, including the digits at the bottom."""
    max_args: int = knob(10, least=2, unit="arguments")
    """Maximum arguments of an operator. The number of arguments is uniform, from 2."""
    growth: float = knob(0.25, least=0, below=1)
    """Probability that an argument is itself an operator."""

    def __post_init__(self) -> None:
        if self.min_length is not None and self.max_length is not None:
            allowed = f"min_length={self.min_length} or more tokens; or null"
            self.require("max_length", self.min_length <= self.max_length, allowed)

    @property
    def vocabulary(self) -> int:
        """Digits, operators, the closing bracket, padding and the question."""
        return QUESTION + 1

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Return the minimum and maximum tokens of an expression in a sequence of `seq_len`."""
        most = seq_len - 1 if self.max_length is None else self.max_length
        return max(MIN_LENGTH, most // 4) if self.min_length is None else self.min_length, most


@lru_cache(maxsize=8)
def length_distribution(config: ListopsConfig, longest: int) -> npt.NDArray[np.float64]:
    """(longest + 1,) probability of each length of an expression whose root is an operator.

    The length of a tree is 2 plus the lengths of its arguments. Therefore, from the deepest level up, the
    distribution of n arguments is the n-fold convolution of the distribution of one.
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
    """One level of many trees, from left to right. The arguments of a node are adjacent on the next level.

    tree (n,): index of each node's tree. arity (n,): number of arguments; 0 for a digit.
    """

    tree: Ints
    arity: Ints

    def of(self, kept: npt.NDArray[np.bool_]) -> Level:
        """Return the nodes of the trees that are kept, with the trees renumbered."""
        here = kept[self.tree]
        return Level((np.cumsum(kept) - 1)[self.tree[here]], self.arity[here])

    @property
    def first(self) -> Ints:
        """Index, on the next level, of the first argument of each operator."""
        arity = self.arity[self.arity > 0]
        return np.cumsum(arity) - arity


def grow(generator: np.random.Generator, config: ListopsConfig, trees: int, longest: int) -> list[Level]:
    """Draw the shapes of `trees` trees with an operator at the root;
    trees over `longest` tokens stop growing."""
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
    """Return the length of the expression below each node, level by level."""
    found, below = [], np.empty(0, dtype=np.int64)
    for level in reversed(levels):
        size = np.ones(len(level.tree), dtype=np.int64)
        if len(level.first):
            size[level.arity > 0] = 2 + np.add.reduceat(below, level.first)
        found.append(below := size)
    return found[::-1]


def evaluate(operator: Ints, arguments: Ints, first: Ints, arity: Ints) -> Ints:
    """(n,) values of n operators; each has `arity` arguments from index `first` on."""
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
    """Draw symbols for the nodes of the trees.
    Returns tokens (N, T), including the question, and answers (N,)."""
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
            before = np.cumsum(size[depth + 1]) - size[depth + 1]  # tokens to the left on this level
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
    """A classification with ten classes, at the last token."""

    Config = ListopsConfig
    config: ListopsConfig
    objectives = ("listops",)

    def __init__(self, config: ListopsConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.shortest, self.longest = config.lengths(setting.seq_len)

    def unsupported(self) -> str | None:
        """The sequence is too short for the requested lengths,
        or expressions of these lengths are too rare."""
        most, config = min(self.setting.seq_len - 1, MAX_LENGTH), self.config
        lengths = f"expressions of {self.shortest:,} to {self.longest:,} tokens"
        if not self.shortest <= self.longest <= most:
            return (
                f"seq_len={self.setting.seq_len:,}: data=listops needs {lengths}; allowed are {MIN_LENGTH} "
                f"to {most:,}: seq_len minus the question, at most {MAX_LENGTH:,}"
            )
        if self.length_probability < MIN_PROBABILITY:
            return (
                f"data=listops: max_depth={config.max_depth}, max_args={config.max_args} and "
                f"growth={config.growth} yield {lengths} less than once in {1 / MIN_PROBABILITY:,.0f} draws"
            )
        return None

    @property
    def length_probability(self) -> float:
        """Probability that an expression with an operator at the root has a requested length."""
        return max(0.0, float(length_distribution(self.config, self.longest)[self.shortest :].sum()))

    @cached_property
    def guess_accuracy(self) -> float:  # type: ignore[override]  # computed on first use
        """Accuracy of always giving the most frequent answer of the test."""
        answers = [answer for _, answer in self._test.values()]
        return max(map(answers.count, answers)) / len(answers)

    def train_batch(self, step: int, done: float) -> Batch:
        """Expressions that do not occur in the test."""
        size, found = self.setting.batch_size, []
        for tokens, answer in self._draw(self.train_generator(step), size):
            if tokens.tobytes() not in self._test:
                found.append((tokens, answer))
                if len(found) == size:
                    break
        return self._batch(found)

    def test_batches(self) -> Iterator[Batch]:
        """Distinct expressions."""
        found = list(self._test.values())
        for start in range(0, len(found), self.setting.batch_size):
            yield self._batch(found[start : start + self.setting.batch_size])

    @cached_property
    def _test(self) -> dict[bytes, Example]:
        """The test examples by their tokens."""
        found: dict[bytes, Example] = {}
        for tokens, answer in self._draw(self.test_generator(0), TESTS_AT_A_TIME):
            found[tokens.tobytes()] = tokens, answer
            if len(found) >= self.setting.test_tokens // self.setting.seq_len:
                break
        return found

    def _draw(self, generator: np.random.Generator, at_a_time: int) -> Iterator[Example]:
        """Yield an endless stream of expressions, about `at_a_time` drawn together."""
        trees = min(math.ceil(at_a_time / self.length_probability), max(1, POOL_TOKENS // self.longest))
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
        return Batch.of(inputs, targets)
