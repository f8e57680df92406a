"""Frequent: which symbol occurs most often in the sequence? The whole context must be read.

Shapes: B batch, T tokens, S symbols.

    inputs    c a b a a c b a … ?      targets    _ _ … _ a      (_ is not scored)

After the aggregation tasks of RULER (Hsieh 2024, arXiv:2404.06654, §3, common and frequent words extraction),
with one answer. The answer occurs more often than any other symbol by a given share of the sequence; all
others are drawn uniformly. No part of the context suffices: a model that reads a share s of the tokens sees
the lead of the answer only by a share s of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.tasks.base import IGNORED, GeneratedTask, Setting, TaskConfig
from variants.knobs import knob

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FrequentConfig(TaskConfig):
    """Knobs of the aggregation task."""

    n_symbols: int = knob(8, least=2, unit="symbols")
    """Number of different symbols."""
    lead: float = knob(0.1, above=0, most=1, unit="of the tokens")
    """How much more often the answer occurs than each other symbol, at least, as a share of the sequence."""

    @property
    def vocabulary(self) -> int:
        """The symbols and the question."""
        return self.n_symbols + 1


class Frequent(GeneratedTask):
    """Symbols in random order, and the question at the end; the target is the most frequent symbol."""

    Config = FrequentConfig
    config: FrequentConfig
    objectives = ("recall",)

    def __init__(self, config: FrequentConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config
        self.guess_accuracy = 1 / config.n_symbols

    def unsupported(self) -> str | None:
        """There must be a symbol beside the question."""
        if self.setting.seq_len > 1:
            return None
        return f"seq_len={self.setting.seq_len}: data=frequent needs 2 tokens or more"

    def draw(self, generator: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        """Draw inputs and targets (B, T).

        All symbols are drawn uniformly; then the answer takes tokens of the others, from the left, until it
        leads.
        """
        symbols, tokens = self.config.n_symbols, self.setting.seq_len - 1
        answers = generator.integers(0, symbols, batch)
        drawn = generator.integers(0, symbols, (batch, tokens))
        lead = max(1, round(self.config.lead * tokens))
        for row, answer in zip(drawn, answers, strict=True):
            counts = np.bincount(row, minlength=symbols)
            for place in np.flatnonzero(row != answer):
                if counts[answer] - np.delete(counts, answer).max() >= lead:
                    break
                counts[row[place]] -= 1
                counts[answer] += 1
                row[place] = answer
        drawn = generator.permuted(drawn, axis=1)
        inputs = np.concatenate([drawn, np.full((batch, 1), symbols)], axis=1)
        targets = np.full_like(inputs, IGNORED)
        targets[:, -1] = answers
        return inputs, targets
