"""Needle: a key–value pair is hidden in filler, and the key at the end queries its value.

Shapes: B batch, T tokens, N depths (`n_depths`), V values (`n_values`).

    inputs   . . . . K v . . . . . . . k u . . K      targets   _ _ … _ v      (_ is not scored)
                     the needle        a distractor
                         |——— distance ————————|

After the key–value retrieval of Liu 2023 (arXiv:2307.03172, §3), whose pairs are JSON strings, and the
passkey task of Mohtashami 2023 (arXiv:2305.16300, §4.2), whose filler is text. Here keys and values are
single symbols and the filler is noise, so that the task tests retrieval only. The distance is the number of
tokens from the query back to the value. The task is the same for causal and bidirectional models: no input at
or after the query contains the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.tasks.base import IGNORED, Batch, Setting, Task, TaskConfig
from variants.knobs import knob

Ints = npt.NDArray[np.int64]

START_DISTANCE = 8
"""Maximum distance of the needles at the start of a curriculum."""


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(TaskConfig):
    """Knobs of the needle task."""

    n_depths: int = knob(8, least=2, unit="distances")
    """Number of distances that are tested. They are evenly spaced from directly before the query to the first
    token."""
    n_distractors: int = knob(0, least=0, unit="pairs")
    """Pairs of other keys and arbitrary values in the filler. Without distractors, the context contains a
    single value and finding it is sufficient. With distractors, the model must match the key, which requires
    two layers and much more training."""
    n_keys: int = knob(16, least=1, unit="symbols")
    """Number of key symbols; the keys of one sequence are distinct."""
    n_values: int = knob(8, least=2, unit="symbols")
    """Number of value symbols, drawn uniformly and independently of the rest of the sequence."""
    n_filler: int = knob(4, least=1, unit="symbols")
    """Number of filler symbols, drawn independently."""
    curriculum: float = knob(0, least=0, most=1)
    """Share of the training during which the maximum distance grows to the whole sequence. 0 uses all
    distances from the start. Retrieval over several layers is learnt sooner after retrieval within one
    layer."""

    def __post_init__(self) -> None:
        more = f"more than n_distractors={self.n_distractors}: the keys of a sequence differ"
        self.require("n_keys", self.n_keys > self.n_distractors, more)

    @property
    def vocabulary(self) -> int:
        """Filler, then keys, then values."""
        return self.n_filler + self.n_keys + self.n_values


class Needle(Task):
    """One pair, queried at the end. Training draws the distance uniformly, up to the maximum of the
    curriculum; the test uses each distance in turn.

    `guess_accuracy` is the accuracy of guessing one of the values in the context. Without distractors that
    would always be correct; it is then 1 / n_values, the accuracy of a model that cannot read the needle.
    """

    Config = NeedleConfig
    config: NeedleConfig
    objectives = ("recall",)

    def __init__(self, config: NeedleConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.farthest = setting.seq_len - 2  # the key is the first token, its value the second
        depths = np.linspace(1, max(1, self.farthest), config.n_depths).round()
        self.distance_edges = tuple(int(distance) for distance in depths)
        others, v = config.n_distractors, config.n_values
        self.guess_accuracy = (1 + others / v) / (1 + others) if others else 1 / v

    def unsupported(self) -> str | None:
        """The sequence must be long enough for the distances,
        and for the pairs at any position of the needle."""
        seq_len, config = self.setting.seq_len, self.config
        need = max(config.n_depths + 2, 2 * config.n_distractors + 4)
        if seq_len >= need:
            return None
        return (
            f"seq_len={seq_len:,}: data=needle with n_depths={config.n_depths} and "
            f"n_distractors={config.n_distractors} needs {need:,} tokens or more"
        )

    def train_batch(self, step: int, done: float) -> Batch:
        """Draws a distance up to the maximum of the curriculum, and a value."""
        generator, size = self.train_generator(step), self.setting.batch_size
        distances = generator.integers(1, self.reached(done) + 1, size)
        values = generator.integers(0, self.config.n_values, size)
        return self._batch(self._contexts(generator, distances), distances, values)

    def reached(self, done: float) -> int:
        """Return the maximum distance at the share `done` of the budget; it grows linearly from
        `START_DISTANCE`."""
        share = self.config.curriculum
        if done >= share:
            return self.farthest
        return min(self.farthest, START_DISTANCE + int((self.farthest - START_DISTANCE) * done / share))

    def test_batches(self) -> Iterator[Batch]:
        """Yield rounds that contain one sequence for each of `distance_edges`; at least one round.

        V rounds contain the same N contexts with each value in turn, and the number of rounds is a multiple
        of V if `test_tokens` allows at least V. A model that cannot read the needle then gives the same
        answer to a context V times and is right once: its accuracy is exactly 1 / V.
        """
        n, v, size = self.config.n_depths, self.config.n_values, self.setting.batch_size
        rounds = max(1, self.setting.test_tokens // (n * self.setting.seq_len))
        if rounds > v:
            rounds -= rounds % v
        for start in range(0, rounds * n, size):
            turn, depth = np.divmod(np.arange(start, min(start + size, rounds * n)), n)
            distances = np.array(self.distance_edges)[depth]
            contexts = [
                self._contexts(self.test_generator(int(context)), distances[[i]])
                for i, context in enumerate(turn // v * n + depth)
            ]
            yield self._batch(np.concatenate(contexts), distances, turn % v)

    def _contexts(self, generator: np.random.Generator, distances: Ints) -> Ints:
        """(B,) → (B, T): filler, distractors, the needle's key and the query; the needle's value is set
        later.

        Pairs start at positions of the needle's parity, so that they do not overlap.
        """
        config, size, seq_len = self.config, len(distances), self.setting.seq_len
        row = np.arange(size)
        tokens = generator.integers(0, config.n_filler, (size, seq_len))
        keys = generator.permuted(np.tile(np.arange(config.n_keys), (size, 1)), axis=1) + config.n_filler
        starts = self.farthest - distances
        if config.n_distractors:
            parity = starts % 2
            slots = np.arange((seq_len - 1) // 2)
            free = 2 * slots + parity[:, None] < seq_len - 2
            free[row, starts // 2] = False
            order = np.where(free, generator.random(free.shape), 2.0).argsort(axis=1)
            others = 2 * order[:, : config.n_distractors] + parity[:, None]
            tokens[row[:, None], others] = keys[:, 1 : config.n_distractors + 1]
            tokens[row[:, None], others + 1] = self._values(
                generator.integers(0, config.n_values, others.shape)
            )
        tokens[row, starts] = tokens[:, -1] = keys[:, 0]
        return tokens

    def _values(self, values: Ints) -> Ints:
        """Return the symbols of the values."""
        return values + self.config.n_filler + self.config.n_keys

    def _batch(self, contexts: Ints, distances: Ints, values: Ints) -> Batch:
        """Build the batch of these contexts with these values in their needles."""
        answers = self._values(values)
        contexts[np.arange(len(contexts)), self.farthest + 1 - distances] = answers
        targets, back = np.full_like(contexts, IGNORED), np.zeros_like(contexts)
        targets[:, -1], back[:, -1] = answers, distances
        return Batch.of(contexts, targets, back)
