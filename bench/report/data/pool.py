"""The losses of the models of one pool, by replicate and by block of text, from their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.intervals import Floats
from bench.report.data.paired import Differences, Ints, Sides, Text


@dataclass(frozen=True)
class Pool:
    """The losses of n models of a pool over S replicates and K blocks of text.

    `carried` are the figures that models are compared by, `reset` those with state fresh in every window.
    Losses by block are used if all records have them for the same blocks: else `text` is None.
    """

    carried: Sides
    reset: Sides
    text: Text | None
    tokens: Floats
    """(n,) scored targets."""

    @classmethod
    def of(cls, records: pd.DataFrame, numbers: Sequence[int]) -> Pool:
        """Take the records with a `number` among these; of several in one replicate the mean."""
        own = records[records["number"].isin(numbers)]
        seeds = {seed: place for place, seed in enumerate(sorted(own["replicate"].unique()))}
        places = {number: place for place, number in enumerate(numbers)}
        model = own["number"].map(places).to_numpy(dtype=np.int64)
        seed = own["replicate"].map(seeds).to_numpy(dtype=np.int64)
        shape = len(numbers), len(seeds)
        text = _text(own)
        tokens = np.full(len(numbers), np.nan)
        tokens[model] = own["tokens_evaluated"].to_numpy(dtype=float)

        def sides(key: str) -> Sides:
            return _sides(own[key], own[f"{key}_by_block"], (model, seed), shape, text)

        return cls(sides("nll"), sides("nll_reset"), text, tokens)

    @property
    def most_freedom(self) -> int:
        """Degrees of freedom of the variance between replicates of all models together."""
        models, seeds = self.carried.means.shape
        return max((int(models) - 1) * (int(seeds) - 1), 0)

    def compared(self, first: Ints, second: Ints) -> Differences:
        """First minus second of pairs of models; models that score different targets are not compared."""
        mine, its = self.carried.take(first), self.carried.take(second)
        other = np.nan_to_num(self.tokens[first]) != np.nan_to_num(self.tokens[second])
        mine = Sides(np.where(other[:, None], np.nan, mine.means), mine.blocks)
        return Differences.of(mine, its, self.text)

    def without_state(self, models: Ints) -> Differences:
        """The models minus themselves with a fresh state in every window."""
        return Differences.of(self.carried.take(models), self.reset.take(models), self.text)


def _text(own: pd.DataFrame) -> Text | None:
    """The blocks that all records share, if they do."""
    columns = [own[key] for key in ("block_targets", "block_documents", "nll_by_block")]
    if not all(isinstance(value, list) and None not in value for column in columns for value in column):
        return None
    targets, documents, losses = ([tuple(value) for value in column] for column in columns)
    if len({*targets}) > 1 or len({*documents}) > 1 or not targets or not targets[0]:
        return None
    if {len(values) for values in (*losses, *documents)} != {len(targets[0])} or min(targets[0]) < 1:
        return None
    return Text.of(targets[0], documents[0])


def _sides(
    losses: pd.Series[float],
    by_block: pd.Series[Any],
    at: tuple[Ints, Ints],
    shape: tuple[int, int],
    text: Text | None,
) -> Sides:
    """Losses of models (n, S), and by block (n, S, K), from those of records and the places `at` which they
    are; NaN where there is none."""
    size = 0 if text is None else len(text.weights)
    sums, counts = np.zeros(shape), np.zeros(shape)
    blocks = np.zeros((*shape, size))
    known = losses.notna().to_numpy()
    at = at[0][known], at[1][known]
    np.add.at(counts, at, 1)
    np.add.at(sums, at, losses.to_numpy(dtype=float)[known])
    if size:
        nothing = [np.nan] * size
        lists = [own if isinstance(own, list) and len(own) == size else nothing for own in by_block]
        np.add.at(blocks, at, np.array(lists, dtype=float)[known])
    with np.errstate(invalid="ignore"):
        return Sides(sums / counts, blocks / counts[:, :, None])
