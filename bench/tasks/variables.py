"""Variables: a value is assigned to a variable, that variable to another, and so on; the last is asked for.

Shapes: B batch, T tokens, H hops (`n_hops`), N chains.

    inputs    . a 7 . . x 4 . b a . . y x . c b . . . c      targets    _ _ … _ 7      (_ is not scored)
                a = 7           b = a       c = b     query

After variable tracking (Hsieh 2024, RULER, arXiv:2404.06654, §3), with single symbols in place of text, and
one answer, the value, in place of the names of all variables. Assignments come in the order of the chain, so
a model that reads from left to right can follow it; it must look back once for each hop. Other chains of the
same length, with other values, are mixed in. The distance is the number of tokens from the query back to the
value. Guessing one of the values in the context is right in one of N cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.tasks.base import IGNORED, GeneratedTask, Setting, TaskConfig
from variants.knobs import knob

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class VariablesConfig(TaskConfig):
    """Knobs of variable tracking."""

    n_hops: int = knob(2, least=1, unit="assignments")
    """Assignments of a chain: 1 assigns the value to the variable that is asked for."""
    n_chains: int = knob(2, least=1, unit="chains")
    """Chains in a sequence, of which one is asked for."""
    n_names: int = knob(32, least=1, unit="symbols")
    """Number of names of variables; those of one sequence are distinct."""
    n_values: int = knob(16, least=2, unit="symbols")
    """Number of values; those of one sequence are distinct."""

    def __post_init__(self) -> None:
        used = self.n_hops * self.n_chains
        enough = f"n_hops·n_chains={used} or more: the names of a sequence differ"
        self.require("n_names", self.n_names >= used, enough)
        each = f"n_chains={self.n_chains} or more: the values of a sequence differ"
        self.require("n_values", self.n_values >= self.n_chains, each)

    @property
    def vocabulary(self) -> int:
        """Names, then values, then the blank."""
        return self.n_names + self.n_values + 1


class Variables(GeneratedTask):
    """Chains of assignments among blanks, and the last variable of one chain at the end."""

    Config = VariablesConfig
    config: VariablesConfig
    objectives = ("recall",)

    def __init__(self, config: VariablesConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config
        self.guess_accuracy = 1 / (config.n_chains if config.n_chains > 1 else config.n_values)
        self.distance_edges = tuple(2**k for k in range(setting.seq_len.bit_length()))

    def unsupported(self) -> str | None:
        """A sequence must have room for the assignments and the query."""
        seq_len, config = self.setting.seq_len, self.config
        need = 2 * config.n_hops * config.n_chains + 1
        if seq_len >= need:
            return None
        return (
            f"seq_len={seq_len:,}: data=variables with n_hops={config.n_hops} and "
            f"n_chains={config.n_chains} needs {need:,} tokens or more"
        )

    def draw(self, generator: np.random.Generator, batch: int) -> tuple[Ints, Ints, Ints]:
        """Draw inputs, targets and distances (B, T); chain 0 is asked for.

        The slots of two tokens are distributed among the chains at random, and are in ascending order within
        each chain.
        """
        config, seq_len, row = self.config, self.setting.seq_len, np.arange(batch)[:, None]
        hops, chains = config.n_hops, config.n_chains
        names = _distinct(generator, batch, config.n_names)[:, : hops * chains].reshape(batch, chains, hops)
        values = config.n_names + _distinct(generator, batch, config.n_values)[:, :chains]
        sources = np.concatenate([values[..., None], names[..., :-1]], axis=2)  # (B, N, H)
        slots = _distinct(generator, batch, (seq_len - 1) // 2)[:, : hops * chains]
        places = 2 * np.sort(slots.reshape(batch, chains, hops), axis=2)

        inputs = np.full((batch, seq_len), config.vocabulary - 1)  # blanks
        each = row[..., None]
        inputs[each, places], inputs[each, places + 1] = names, sources
        inputs[:, -1] = names[:, 0, -1]
        targets, distances = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
        targets[:, -1], distances[:, -1] = values[:, 0], seq_len - 2 - places[:, 0, 0]
        return inputs, targets, distances


def _distinct(generator: np.random.Generator, rows: int, count: int) -> Ints:
    """(rows, count): the numbers below `count`, in an order of its own in each row."""
    return generator.permuted(np.tile(np.arange(count), (rows, 1)), axis=1)
