"""Prediction of a cell's memory and FLOPs without its hardware, and search for the largest size within a
memory budget.

Peak memory is almost affine in the sequence length and in the batch size, so a search needs few predictions:
two determine a line, and one or two more confirm the size that it suggests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.config.spec import CellSpec
from bench.measure import step
from bench.measure.step import StepFigures, Subject
from bench.model.language_model import LanguageModel
from bench.tasks.base import Batch

CPU = torch.device("cpu")
TOKENS = 1024
"""Step of the search for the longest sequence, in tokens."""
MAX_TOKENS, MAX_SEQUENCES = 2**22, 2**16
"""Upper limits of the searches."""
SEARCH_TOLERANCE = 0.01
"""Relative tolerance of a search: it ends when a size that is larger by this share, or by one, does not
fit."""


def largest(peak: Callable[[int], int], budget: int, maximum: int) -> int:
    """Return the largest n from 1 to `maximum` with peak(n) ≤ budget, within `SEARCH_TOLERANCE`; 0 if even
    n = 1 does not fit.

    `peak` must not decrease with n. If it is affine it is called four times, otherwise O(log n) times.
    """
    known: dict[int, int] = {}

    def fits(n: int) -> bool:
        if n not in known:
            known[n] = peak(n)
        return known[n] <= budget

    if not fits(1):
        return 0
    fitting, failing = 1, maximum + 1
    guess, slow = max(math.isqrt(maximum), min(2, maximum)), 0  # far enough from 1 to determine a line
    while failing - fitting > (margin := max(1, int(SEARCH_TOLERANCE * fitting))):
        before = failing - fitting
        if fits(guess):
            fitting = guess
        else:
            failing = guess
        slow = slow + 1 if 2 * (failing - fitting) > before else 0
        if slow == 3:  # two interpolations in a row may leave the bracket wide; after a third one, bisect
            slow, guess = 0, _geometric_mean(fitting, failing)
        else:
            guess = _interpolated(known, budget, fitting, failing, margin)
        guess = min(max(guess, fitting + 1), failing - 1)
    return fitting


def _geometric_mean(fitting: int, failing: int) -> int:
    return int((fitting * failing) ** 0.5)


def _interpolated(known: dict[int, int], budget: int, fitting: int, failing: int, margin: int) -> int:
    """Return the size at which a line meets the budget: the line through the ends of the bracket, or through
    the two largest sizes that fit if the upper end is not known.

    The result is at least `margin` above the largest size that fits: if it does not fit, the search ends.
    """
    below = sorted(n for n in known if n <= fitting)[-2:]
    a, b = (fitting, failing) if failing in known else (below[0], below[-1])
    if known[b] == known[a]:
        return _geometric_mean(fitting, failing)
    size = a + int((budget - known[a]) * (b - a) / (known[b] - known[a]))
    return max(size, fitting + margin)


def build_model(spec: CellSpec) -> LanguageModel:
    """Return the cell's model, with the initial weights of its replicate."""
    _, _, dims = spec.attention()
    _, task_config, _ = spec.task()
    torch.manual_seed(spec.replicate)
    return LanguageModel(
        spec.model_spec(),
        dims,
        depth=spec.depth,
        ff_chunks=spec.model.ff_chunks,
        dropout=spec.model.dropout,
        vocabulary=spec.model.vocab_size or task_config.vocabulary,
        tie_embeddings=spec.model.tie_embeddings,
        embedding_size=spec.model.embedding_size,
        activations=spec.activations,
        dtype=getattr(torch, spec.dtype),
    )


def subject(spec: CellSpec, batch: Callable[[], Batch], device: torch.device) -> Subject:
    """Return the cell's model, its optimiser and a batch, ready for a training step."""
    return Subject.make(lambda: build_model(spec), batch, causal=spec.causal, device=device)


class Prediction:
    """Predictions for one cell at any length and batch size; each combination is computed once."""

    def __init__(self, spec: CellSpec) -> None:
        self.spec = spec
        self._known: dict[tuple[int, int], StepFigures] = {}

    def predict(self, *, seq_len: int | None = None, batch_size: int | None = None) -> StepFigures:
        """Return the figures of a training step. It runs on fake tensors with the CPU's kernels, and divides
        its work into tiles as on the cell's own device."""
        key = seq_len or self.spec.seq_len, batch_size or self.spec.batch_size
        if key not in self._known:
            spec = replace(self.spec, seq_len=key[0], batch_size=key[1])

            def empty_batch() -> Batch:
                tokens = torch.zeros(spec.batch_size, spec.seq_len, dtype=torch.int64)
                return Batch(tokens, tokens.clone())

            self._known[key] = step.predicted(lambda: subject(spec, empty_batch, CPU))
        return self._known[key]

    def longest_seq_len(self, budget: int) -> int:
        """Return the largest multiple of `TOKENS`, up to `MAX_TOKENS`, whose step fits into `budget` bytes;
        0 if none does."""

        def peak(n: int) -> int:
            return self.predict(seq_len=n * TOKENS).peak_bytes

        return TOKENS * largest(peak, budget, MAX_TOKENS // TOKENS)

    def largest_batch_size(self, budget: int) -> int:
        """Return the largest batch size, up to `MAX_SEQUENCES`, whose step fits into `budget` bytes; 0 if
        none does."""
        return largest(lambda n: self.predict(batch_size=n).peak_bytes, budget, MAX_SEQUENCES)
