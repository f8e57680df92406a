"""Needle: a key and its value are hidden in filler, and at the end the key asks for its value.

Shapes: B batch, T tokens, N depths (`n_depths`), V values (`n_values`).

    inputs   . . . . K v . . . . . . . k u . . K      targets   _ _ … _ v      (_ is not scored)
                     the needle        a distractor
                         |——— distance ————————|

After the key–value retrieval of Liu 2023 (arXiv:2307.03172, §3), whose pairs are strings of JSON, and the
passkey of Mohtashami 2023 (arXiv:2305.16300, §4.2), whose filler is text; here all are single symbols and
the filler is noise, so that what is asked is retrieval alone. Distance is counted in tokens from the query
back to the value. Causal and bidirectional models are asked the same: no input at or after the query holds
the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.tasks.base import IGNORED, Batch, Setting, Task, TaskConfig

Ints = npt.NDArray[np.int64]

NEAREST = 8
"""Tokens back within which a curriculum's first needles stand."""


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(TaskConfig):
    """Knobs of the needle."""

    n_depths: int = 8
    """Distances that are tested, evenly spaced from next to the query back to the first token."""
    n_distractors: int = 0
    """Pairs of other keys and any values in the filler. With none the context holds one value and finding it
    is enough; with some the key decides, which takes two layers and much longer to learn."""
    n_keys: int = 16
    """Symbols that are keys; those of one sequence differ."""
    n_values: int = 8
    """Symbols that are values, each as likely as any other whatever the rest of the sequence is."""
    n_filler: int = 4
    """Symbols of the filler, drawn independently."""
    curriculum: float = 0.0
    """Share of the training over which the farthest needle moves back to the first token; 0 for anywhere from
    the start. What passes from layer to layer is learnt sooner once one layer's part of it is."""

    def __post_init__(self) -> None:
        self.require("n_depths", self.n_depths >= 2, "2 or more")
        self.require("n_distractors", self.n_distractors >= 0, "0 or more")
        more = f"more than n_distractors={self.n_distractors}: the keys of a sequence differ"
        self.require("n_keys", self.n_keys > self.n_distractors, more)
        self.require("n_values", self.n_values >= 2, "2 or more")
        self.require("n_filler", self.n_filler >= 1, "1 or more")
        self.require("curriculum", 0 <= self.curriculum <= 1, "0 to 1")

    @property
    def vocabulary(self) -> int:
        """Filler first, then keys, then values."""
        return self.n_filler + self.n_keys + self.n_values


class Needle(Task):
    """One pair asked for at the end. Training draws its distance uniformly, up to where a curriculum has come
    to; a test takes each in turn.

    `guess_accuracy` is what is right of guesses among the values in the context. Without distractors that
    would be the answer, so it is 1 / n_values then: what a model comes to that cannot see the needle.
    """

    Config = NeedleConfig
    config: NeedleConfig
    objectives = ("recall",)

    def __init__(self, config: NeedleConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.farthest = setting.seq_len - 2  # the key stands first, its value second
        depths = np.linspace(1, max(1, self.farthest), config.n_depths).round()
        self.distance_edges = tuple(int(distance) for distance in depths)
        others, v = config.n_distractors, config.n_values
        self.guess_accuracy = (1 + others / v) / (1 + others) if others else 1 / v

    def unsupported(self) -> str | None:
        """Too short for its distances, or for its pairs side by side wherever the needle stands."""
        seq_len, config = self.setting.seq_len, self.config
        need = max(config.n_depths + 2, 2 * config.n_distractors + 4)
        if seq_len >= need:
            return None
        return (
            f"seq_len={seq_len:,}: data=needle with n_depths={config.n_depths} and "
            f"n_distractors={config.n_distractors} needs {need:,} tokens or more"
        )

    def train_batch(self, step: int, done: float) -> Batch:
        """Any distance that the curriculum has come to, any value."""
        generator, size = self.train_generator(step), self.setting.batch_size
        distances = generator.integers(1, self.reached(done) + 1, size)
        values = generator.integers(0, self.config.n_values, size)
        return self._batch(self._contexts(generator, distances), distances, values)

    def reached(self, done: float) -> int:
        """The farthest distance drawn when `done` of the budget is spent: it grows evenly from `NEAREST`."""
        share = self.config.curriculum
        if done >= share:
            return self.farthest
        return min(self.farthest, NEAREST + int((self.farthest - NEAREST) * done / share))

    def test_batches(self) -> Iterator[Batch]:
        """Rounds of one sequence at each of `distance_edges`, at least one round.

        V rounds hold the same N contexts with each value in turn, and there are whole multiples of V rounds
        where `test_tokens` allows V. A model that does not see the needle then answers a context alike V
        times and is right once: its accuracy is not near 1 / V but 1 / V.
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
        """(B,) → (B, T): filler, distractors, the needle's key and the query; its value is still to be set.

        Pairs start at the positions of the needle's parity, so that no two overlap.
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
        """Their symbols."""
        return values + self.config.n_filler + self.config.n_keys

    def _batch(self, contexts: Ints, distances: Ints, values: Ints) -> Batch:
        """The contexts with these values in their needles."""
        answers = self._values(values)
        contexts[np.arange(len(contexts)), self.farthest + 1 - distances] = answers
        targets, back = np.full_like(contexts, IGNORED), np.zeros_like(contexts)
        targets[:, -1], back[:, -1] = answers, distances
        return Batch(*(torch.from_numpy(array) for array in (contexts, targets, back)))
