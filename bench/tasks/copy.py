"""Copy: a block of symbols must be repeated at the end of the sequence, in order.

Shapes: B batch, T tokens, N symbols to copy.

    inputs    . . a b c . . . . . . . C C C      targets    _ _ _ … _ a b c      (_ is not scored)
                  the block             copy marks
                  |———— distance ———————|

    scattered . a . . b . . . c . . . C C C

After the copying task (Hochreiter 1997; Arjovsky 2016, arXiv:1511.06464, §5.1) and, with `scattered`,
selective copying (Gu 2023, Mamba, arXiv:2312.00752, §3.1), where the places of the symbols differ in each
sequence. A state of fixed size holds a limited number of symbols, attention any number (Jelassi 2024,
arXiv:2402.01032, §2). The inputs at the end are copy marks and not the symbols themselves, so each answer
must come from the block, by its place. Where the symbols themselves are repeated, and are found by content,
see the task induction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.tasks.base import IGNORED, GeneratedTask, Setting, TaskConfig
from variants.knobs import knob

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CopyConfig(TaskConfig):
    """Knobs of the copying task."""

    n_tokens: int = knob(8, least=1, unit="symbols")
    """Symbols to copy, drawn independently."""
    n_symbols: int = knob(16, least=2, unit="symbols")
    """Number of different symbols."""
    scattered: bool = False
    """Whether the symbols stand at random places among the blanks, instead of side by side."""

    @property
    def vocabulary(self) -> int:
        """The symbols, the blank and the copy mark."""
        return self.n_symbols + 2


class Copy(GeneratedTask):
    """The block at a random place, and as many copy marks at the end; the target at mark k is symbol k."""

    Config = CopyConfig
    config: CopyConfig
    objectives = ("recall",)

    def __init__(self, config: CopyConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config
        self.guess_accuracy = 1 / config.n_symbols
        self.distance_edges = tuple(2**k for k in range(setting.seq_len.bit_length()))

    def unsupported(self) -> str | None:
        """A sequence must have room for the symbols and the marks."""
        seq_len, need = self.setting.seq_len, 2 * self.config.n_tokens
        if seq_len >= need:
            return None
        n = self.config.n_tokens
        return f"seq_len={seq_len:,}: data=copy with n_tokens={n:,} needs {need:,} tokens or more"

    def draw(self, generator: np.random.Generator, batch: int) -> tuple[Ints, Ints, Ints]:
        """Draw inputs, targets and distances (B, T)."""
        seq_len, n, symbols = self.setting.seq_len, self.config.n_tokens, self.config.n_symbols
        end, row = seq_len - n, np.arange(batch)[:, None]
        if self.config.scattered:
            places = np.sort(generator.random((batch, end)).argsort(axis=1)[:, :n], axis=1)
        else:
            places = generator.integers(0, end - n, (batch, 1), endpoint=True) + np.arange(n)
        block = generator.integers(0, symbols, (batch, n))
        inputs = np.full((batch, seq_len), symbols)  # blanks
        inputs[row, places], inputs[:, end:] = block, symbols + 1
        targets, distances = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
        targets[:, end:], distances[:, end:] = block, np.arange(end, seq_len) - places
        return inputs, targets, distances
