"""Needle: key–value pairs are hidden in filler, and keys at the end query their values.

Shapes: B batch, T tokens, N depths (`n_depths`), V values (`n_values`), Q queries (`n_queries`), R values of
a queried key (`n_answers`), A = Q·R answers.

    inputs   . . . . K v . . . . . . . k u . . K      targets   _ _ … _ v      (_ is not scored)
                     the needle        a distractor
                         |——— distance ————————|

    n_queries=2, n_answers=2: the values of a key in the order in which they stand, each with a mark after the
    first

    inputs   . K v . . L x . L y . . . K w . . L ? K ?      targets   _ … x y v w

After the key–value retrieval of Liu 2023 (arXiv:2307.03172, §3), whose pairs are JSON strings, and the
passkey task of Mohtashami 2023 (arXiv:2305.16300, §4.2), whose filler is text. Here keys and values are
single symbols and the filler is noise, so that the task tests retrieval only. Several needles are those of
RULER (Hsieh 2024, arXiv:2404.06654, §3): `n_distractors` are its multi-key, `n_queries` its multi-query and
`n_answers` its multi-value retrieval. RULER accepts the values of a key in any order; here their order is
asked for, because each target is one token. The distance is the number of tokens from the place of an answer
back to its value. The task is the same for causal and bidirectional models: no input at or after the first
query contains an answer.
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
    n_queries: int = knob(1, least=1, unit="keys", younger=True)
    """Keys that are queried at the end of the sequence, one after the other."""
    n_answers: int = knob(1, least=1, unit="values", younger=True)
    """Values of each queried key, which stands once before each of them. They are answered in the order in
    which they stand, so the model must also count."""

    def __post_init__(self) -> None:
        keys = self.n_distractors + self.n_queries
        enough = f"n_distractors + n_queries = {keys} or more: the keys of a sequence differ"
        self.require("n_keys", self.n_keys >= keys, enough)

    @property
    def answers(self) -> int:
        """A, the answers at the end of a sequence."""
        return self.n_queries * self.n_answers

    @property
    def vocabulary(self) -> int:
        """Filler, then keys, then values, then the mark if a key has several values."""
        return self.n_filler + self.n_keys + self.n_values + (self.n_answers > 1)


class Needle(Task):
    """Needles, queried at the end. Training draws the distance of one needle of a sequence uniformly, up to
    the maximum of the curriculum, and the test uses each distance in turn. Others are placed at random.

    `guess_accuracy` is the accuracy of guessing one of the values in the context. With a single pair that
    would always be correct; it is then 1 / n_values, the accuracy of a model that cannot read the needle.
    """

    Config = NeedleConfig
    config: NeedleConfig
    objectives = ("recall",)

    def __init__(self, config: NeedleConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.end = setting.seq_len - config.answers  # the first query
        self.farthest = self.end - 1  # the key is the first token, its value the second
        depths = np.linspace(1, max(1, setting.seq_len - 2), config.n_depths).round()
        self.distance_edges = tuple(int(distance) for distance in depths)
        others, v = config.n_distractors + config.answers - 1, config.n_values
        self.guess_accuracy = (1 + others / v) / (1 + others) if others else 1 / v

    def unsupported(self) -> str | None:
        """The sequence must be long enough for the distances,
        and for the pairs at any position of the needle."""
        seq_len, config = self.setting.seq_len, self.config
        pairs = config.n_distractors + config.answers
        need = max(config.n_depths + 2, 2 * pairs + config.answers + 1)
        if seq_len >= need:
            return None
        several = f", n_queries={config.n_queries}, n_answers={config.n_answers}"
        return (
            f"seq_len={seq_len:,}: data=needle with n_depths={config.n_depths} and "
            f"n_distractors={config.n_distractors}{several if config.answers > 1 else ''} "
            f"needs {need:,} tokens or more"
        )

    def train_batch(self, step: int, done: float) -> Batch:
        """Draws a distance up to the maximum of the curriculum, and values."""
        generator, size, reached = self.train_generator(step), self.setting.batch_size, self.reached(done)
        distances = generator.integers(1, reached + 1, size)
        values = generator.integers(0, self.config.n_values, (size, self.config.answers))
        return self._batch(*self._contexts(generator, distances, reached), values)

    def reached(self, done: float) -> int:
        """Return the maximum distance at the share `done` of the budget; it grows linearly from
        `START_DISTANCE`. Distances are those from the first query."""
        share = self.config.curriculum
        if done >= share:
            return self.farthest
        return min(self.farthest, START_DISTANCE + int((self.farthest - START_DISTANCE) * done / share))

    def test_batches(self) -> Iterator[Batch]:
        """Yield rounds that contain one sequence for each of `distance_edges`; at least one round.

        V rounds contain the same N contexts with each value in turn in each needle, and the number of rounds
        is a multiple of V if `test_tokens` allows at least V. A model that cannot read any needle then gives
        the same answers to a context V times and each is right once: its accuracy is exactly 1 / V.
        """
        n, v, size = self.config.n_depths, self.config.n_values, self.setting.batch_size
        rounds = max(1, self.setting.test_tokens // (n * self.setting.seq_len))
        if rounds > v:
            rounds -= rounds % v
        for start in range(0, rounds * n, size):
            turn, depth = np.divmod(np.arange(start, min(start + size, rounds * n)), n)
            distances = np.minimum(np.array(self.distance_edges)[depth], self.farthest)
            drawn = [
                self._test_context(int(context), distances[[i]])
                for i, context in enumerate(turn // v * n + depth)
            ]
            contexts, places, first = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
            yield self._batch(contexts, places, (first + turn[:, None]) % v)

    def _test_context(self, index: int, distance: Ints) -> tuple[Ints, Ints, Ints]:
        """Return one context with the places of its values, and its values (1, A) in the first round."""
        generator = self.test_generator(index)
        contexts, places = self._contexts(generator, distance, self.farthest)
        first = generator.integers(0, self.config.n_values, places.shape)
        first[:, 0] = 0
        return contexts, places, first

    def _contexts(self, generator: np.random.Generator, distances: Ints, reached: int) -> tuple[Ints, Ints]:
        """(B,) → (B, T), (B, A): filler, distractors, the needles' keys and the queries, and the places of
        the needles' values in the order of the answers; the values are set later.

        One needle of a sequence has the given distance from the first query, and the others at most
        `reached` if there is room. Pairs start at positions of this needle's parity, so that they do not
        overlap.
        """
        config, size, seq_len = self.config, len(distances), self.setting.seq_len
        row = np.arange(size)[:, None]
        tokens = generator.integers(0, config.n_filler, (size, seq_len))
        keys = generator.permuted(np.tile(np.arange(config.n_keys), (size, 1)), axis=1) + config.n_filler
        starts = (self.farthest - distances)[:, None]
        slots, parity = np.arange(self.end // 2), starts % 2
        free = 2 * slots + parity < self.farthest
        free[row, starts // 2] = False
        if config.answers > 1:
            late = 2 * slots + parity < self.farthest - reached  # taken where there are too few others
            order = np.where(free, generator.random(free.shape) + late, 2.0).argsort(axis=1)
            others = order[:, : config.answers - 1]
            free[row, others] = False
            starts = generator.permuted(np.concatenate([starts, 2 * others + parity], axis=1), axis=1)
            of_key = np.sort(starts.reshape(size, config.n_queries, config.n_answers), axis=2)
            starts = of_key.reshape(size, config.answers)
        if config.n_distractors:
            order = np.where(free, generator.random(free.shape), 2.0).argsort(axis=1)
            others = 2 * order[:, : config.n_distractors] + parity
            tokens[row, others] = keys[:, config.n_queries : config.n_queries + config.n_distractors]
            tokens[row, others + 1] = self._values(generator.integers(0, config.n_values, others.shape))
        tokens[row, starts] = np.repeat(keys[:, : config.n_queries], config.n_answers, axis=1)
        tokens[:, self.end :] = config.vocabulary - 1  # marks
        tokens[:, self.end :: config.n_answers] = keys[:, : config.n_queries]
        return tokens, starts + 1

    def _values(self, values: Ints) -> Ints:
        """Return the symbols of the values."""
        return values + self.config.n_filler + self.config.n_keys

    def _batch(self, contexts: Ints, places: Ints, values: Ints) -> Batch:
        """Build the batch of these contexts with these values (B, A) in their needles."""
        answers = self._values(values)
        contexts[np.arange(len(contexts))[:, None], places] = answers
        targets, back = np.full_like(contexts, IGNORED), np.zeros_like(contexts)
        targets[:, self.end :], back[:, self.end :] = answers, np.arange(self.end, contexts.shape[1]) - places
        return Batch.of(contexts, targets, back)
