"""Multi-query associative recall: key–value pairs, followed by queries, which are the keys again.

Shapes: B batch, T tokens, N pairs.

    inputs    a 1 b 2 c 3 . . c . . . a . . . . . b .     letters are keys, digits values, dots filler
    targets   _ _ _ _ _ _ _ _ 3 _ _ _ 1 _ _ _ _ _ 2 _     (_ is not scored)
                                      |
              - 1 is 11 tokens back --|

After Arora 2023 (Zoology, arXiv:2312.04927, §3 and the appendix on synthetic data). Keys and values come from
the two halves of the symbols and are distinct within a sequence. The pairs come first. Each key is queried
once, at a position drawn from a power law. The filler is one additional blank symbol. The answer occurs only
in its pair.

With the compute of two cores, a model does not learn many pairs from scratch. Therefore the number of pairs
may grow during an initial share of training (`curriculum`), which the paper does not use. Until all pairs are
used, half of the query positions are used, because few scored targets per sequence give a slow learning
signal. Test batches always use all pairs, each queried once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.tasks.base import IGNORED, Batch, GeneratedTask, Setting, TaskConfig
from variants.knobs import knob

Ints = npt.NDArray[np.int64]

MIN_PAIRS = 2
"""Pairs at the start of a curriculum: with a single pair there is nothing to distinguish."""


@dataclass(frozen=True, kw_only=True)
class MqarConfig(TaskConfig):
    """Knobs of the recall task."""

    n_pairs: int = knob(4, least=1, unit="pairs")
    """Pairs in a sequence, each queried once."""
    n_symbols: int = knob(64, least=2, multiple=2, unit="symbols")
    """Symbols without the blank; the lower half are keys, the upper half values."""
    power_a: float = knob(0.01, above=0, most=1)
    """Exponent a of the power law of the positions of queries. The relative position x of a query, in (0, 1]
    after the pairs, has density a·x^(a − 1). Smaller values place queries closer to the pairs; 1 is
    uniform."""
    curriculum: float = knob(0, least=0, most=1)
    """Share of the training during which the number of pairs grows to n_pairs; 0 uses all from the start."""

    def __post_init__(self) -> None:
        enough = self.n_symbols >= 2 * self.n_pairs
        least = f"an even number, 2·n_pairs={2 * self.n_pairs} or more: keys and values differ in a sequence"
        self.require("n_symbols", enough, least)

    @property
    def vocabulary(self) -> int:
        """All symbols, and then the blank."""
        return self.n_symbols + 1


class Mqar(GeneratedTask):
    """Pairs, followed by one query per pair among filler; the target at a query is its value."""

    Config = MqarConfig
    config: MqarConfig
    objectives = ("recall",)

    def __init__(self, config: MqarConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config
        self.guess_accuracy = 1 / config.n_pairs
        self.distance_edges = tuple(2**k for k in range(setting.seq_len.bit_length()))

    def unsupported(self) -> str | None:
        """A sequence must have room for the pairs and as many query positions."""
        seq_len, n = self.setting.seq_len, self.config.n_pairs
        if seq_len >= 4 * n:
            return None
        return f"seq_len={seq_len:,}: data=mqar with n_pairs={n:,} needs {4 * n:,} tokens or more"

    def train_batch(self, step: int, done: float) -> Batch:
        """The number of pairs is that of the curriculum at `done`."""
        return Batch.of(*self._draw(self.train_generator(step), self.setting.batch_size, self.pairs(done)))

    def draw(self, generator: np.random.Generator, batch: int) -> tuple[Ints, Ints, Ints]:
        """Draw sequences with all pairs."""
        return self._draw(generator, batch, self.config.n_pairs)

    def pairs(self, done: float) -> int:
        """Return the number of pairs in a training batch at the share `done` of the budget: it grows
        exponentially from `MIN_PAIRS` to n_pairs, so that each doubling takes equally long."""
        n, share = self.config.n_pairs, self.config.curriculum
        if done >= share or n <= MIN_PAIRS:
            return n
        return min(n, int(MIN_PAIRS * (n / MIN_PAIRS) ** (done / share)))

    def _draw(self, generator: np.random.Generator, batch: int, n: int) -> tuple[Ints, Ints, Ints]:
        """Draw inputs, targets and distances (B, T) with n pairs; if n < n_pairs, half of the query positions
        are used."""
        seq_len, half = self.setting.seq_len, self.config.n_symbols // 2
        slots = (seq_len - 2 * n) // 2
        keys, values = _distinct(generator, batch, n, half), half + _distinct(generator, batch, n, half)
        row, pair = np.arange(batch)[:, None], np.arange(n)
        asks = n if n == self.config.n_pairs else max(n, slots // 2)
        asked = np.arange(asks) % n
        query = 2 * n + 2 * self._places(generator, batch, asks, slots)

        inputs = np.full((batch, seq_len), self.config.n_symbols)  # blanks
        inputs[row, 2 * pair], inputs[row, 2 * pair + 1] = keys, values
        inputs[row, query] = keys[:, asked]
        targets, distances = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
        targets[row, query], distances[row, query] = values[:, asked], query - (2 * asked + 1)
        return inputs, targets, distances

    def _places(self, generator: np.random.Generator, batch: int, n: int, slots: int) -> Ints:
        """(B, N) distinct slots in [0, slots), drawn without replacement with power-law weights.

        The indices of the n smallest values of Exp(1) / weight are such a draw (Efraimidis 2006, Inf.
        Process. Lett. 97).
        """
        weight = np.arange(1, slots + 1) ** (self.config.power_a - 1.0)
        clocks = generator.exponential(size=(batch, slots)) / weight
        chosen = np.argpartition(clocks, n - 1, axis=1)[:, :n]
        return generator.permuted(chosen, axis=1)


def _distinct(generator: np.random.Generator, rows: int, n: int, most: int) -> Ints:
    """(rows, n) uniformly drawn numbers below `most`, distinct within each row.

    Floyd's sampling (Bentley 1987, Commun. ACM 30), which costs n² per row regardless of the number of
    symbols.
    """
    chosen = np.empty((rows, n), dtype=np.int64)
    for k, last in enumerate(range(most - n, most)):
        drawn = generator.integers(0, last, rows, endpoint=True)
        taken = (chosen[:, :k] == drawn[:, None]).any(axis=1)
        chosen[:, k] = np.where(taken, last, drawn)
    return generator.permuted(chosen, axis=1)
