"""Induction: a block of symbols occurs again at a distance, and the rest of it follows from its first symbol.

Shapes: B batch, T tokens, N symbols of the block.

    inputs    . . a b c d . . . . . . a b c d . .      targets    _ _ … b c d _ _ _      (_ is not scored)
                  |———— distance ————|

After the repeated random tokens by which induction heads are found (Olsson 2022, arXiv:2209.11895, §"Defining
induction heads": [A][B] … [A] → [B]); there the block is half of the sequence, which is `n_tokens=T/2` here.
Whoever finds the earlier occurrence of a token, and reads the token after it, is always right. Unlike in the
task copy, the inputs are the symbols themselves, so that a model finds them by content; unlike in mqar, a
symbol is both an answer and the next question. It is language modelling, with the answer as the next input:
only causal models have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.tasks.base import IGNORED, GeneratedTask, Setting, TaskConfig
from variants.knobs import knob

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class InductionConfig(TaskConfig):
    """Knobs of the induction task."""

    n_tokens: int = knob(8, least=2, unit="symbols")
    """Symbols of the block, all different; all but the first of the repetition are scored."""
    distance: int | None = knob(None, least=2, unit="tokens")
    """Tokens from the block to its repetition, n_tokens or more. null draws it for each sequence, from
    n_tokens to the longest that fits, with equal probability for each doubling."""
    n_symbols: int = knob(64, least=2, unit="symbols")
    """Number of symbols of blocks."""
    n_filler: int = knob(4, least=1, unit="symbols")
    """Number of filler symbols, drawn independently."""

    def __post_init__(self) -> None:
        different = f"n_tokens={self.n_tokens} or more: the symbols of a block differ"
        self.require("n_symbols", self.n_symbols >= self.n_tokens, different)
        apart = f"null, or n_tokens={self.n_tokens} or more: the blocks do not overlap"
        self.require("distance", self.distance is None or self.distance >= self.n_tokens, apart)

    @property
    def vocabulary(self) -> int:
        """The symbols, then the filler."""
        return self.n_symbols + self.n_filler


class Induction(GeneratedTask):
    """A block and its repetition in filler.

    `guess_accuracy` is that of a model that sees only the repetition, and guesses among the symbols that it
    has not seen there.
    """

    Config = InductionConfig
    config: InductionConfig
    objectives = ("clm",)

    def __init__(self, config: InductionConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config
        self.guess_accuracy = float(np.mean(1 / (config.n_symbols - np.arange(1, config.n_tokens))))
        self.distance_edges = tuple(2**k for k in range(setting.seq_len.bit_length()))

    def unsupported(self) -> str | None:
        """A sequence must have room for the block and its repetition."""
        seq_len, n, distance = self.setting.seq_len, self.config.n_tokens, self.config.distance
        need = n + (distance or n)
        if seq_len >= need:
            return None
        far = "" if distance is None else f" and distance={distance:,}"
        return f"seq_len={seq_len:,}: data=induction with n_tokens={n:,}{far} needs {need:,} tokens or more"

    def draw(self, generator: np.random.Generator, batch: int) -> tuple[Ints, Ints, Ints]:
        """Draw inputs, targets and distances (B, T)."""
        config, seq_len, row = self.config, self.setting.seq_len, np.arange(batch)[:, None]
        n = config.n_tokens
        distance = self._distances(generator, batch)[:, None]
        first = generator.integers(0, seq_len - n - distance, endpoint=True) + np.arange(n)
        symbols = np.tile(np.arange(config.n_symbols), (batch, 1))
        block = generator.permuted(symbols, axis=1)[:, :n]
        inputs = config.n_symbols + generator.integers(0, config.n_filler, (batch, seq_len))
        inputs[row, first] = inputs[row, first + distance] = block
        targets, back, asked = np.full_like(inputs, IGNORED), np.zeros_like(inputs), first[:, :-1] + distance
        targets[row, asked], back[row, asked] = block[:, 1:], distance - 1
        return inputs, targets, back

    def _distances(self, generator: np.random.Generator, batch: int) -> Ints:
        """(B,) tokens from the block to its repetition."""
        n, longest = self.config.n_tokens, self.setting.seq_len - self.config.n_tokens
        if self.config.distance is not None:
            return np.full(batch, self.config.distance)
        exponents = generator.uniform(np.log(n), np.log(longest + 1), batch)
        return np.clip(np.exp(exponents).astype(np.int64), n, longest)  # exp may round past the ends
