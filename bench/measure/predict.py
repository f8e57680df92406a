"""What a cell will take, without its hardware, and the largest that fits into a memory budget.

A peak is close to affine in the length of a sequence and in the number of sequences, so a search needs
few predictions: two say where to look, a third and a fourth confirm it.
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
"""Lengths are searched in multiples of this."""
MOST_TOKENS, MOST_SEQUENCES = 2**22, 2**16
"""Where the searches end."""
CLOSE = 0.01
"""A size is the largest where one larger by this share, or by one, does not fit."""


def largest(peak: Callable[[int], int], budget: int, most: int) -> int:
    """The largest n from 1 to `most` with peak(n) ≤ budget, to within `CLOSE`; 0 where there is none.

    `peak` must not fall with n. An affine one is called four times, any other O(log n) times.
    """
    known: dict[int, int] = {}

    def fits(n: int) -> bool:
        if n not in known:
            known[n] = peak(n)
        return known[n] <= budget

    if not fits(1):
        return 0
    fitting, failing = 1, most + 1
    guess, slow = max(math.isqrt(most), min(2, most)), 0  # far enough for a line through both
    while failing - fitting > (margin := max(1, int(CLOSE * fitting))):
        before = failing - fitting
        if fits(guess):
            fitting = guess
        else:
            failing = guess
        slow = slow + 1 if 2 * (failing - fitting) > before else 0
        if slow == 3:  # of a line's guesses two in a row may leave the bracket wide, and then it shrinks
            slow, guess = 0, _middle(fitting, failing)
        else:
            guess = _crossing(known, budget, fitting, failing, margin)
        guess = min(max(guess, fitting + 1), failing - 1)
    return fitting


def _middle(fitting: int, failing: int) -> int:
    """Halfway, as factors go."""
    return int((fitting * failing) ** 0.5)


def _crossing(known: dict[int, int], budget: int, fitting: int, failing: int, margin: int) -> int:
    """Where the line through the two largest sizes that fit, or the bracket's ends, meets the budget.

    Just above the size that fits, if it is there: what fails there ends the search.
    """
    below = sorted(n for n in known if n <= fitting)[-2:]
    a, b = (fitting, failing) if failing in known else (below[0], below[-1])
    if known[b] == known[a]:
        return _middle(fitting, failing)
    found = a + int((budget - known[a]) * (b - a) / (known[b] - known[a]))
    return found if found > fitting + margin else fitting + margin


def build_model(spec: CellSpec) -> LanguageModel:
    """The model of a cell, with its replicate's weights."""
    _, _, dims = spec.attention()
    _, task_config, _ = spec.task()
    torch.manual_seed(spec.replicate)
    return LanguageModel(
        spec.model_spec(),
        dims,
        depth=spec.depth,
        ff_chunks=spec.model.ff_chunks,
        dropout=spec.model.dropout,
        vocabulary=task_config.vocabulary,
        activations=spec.activations,
        dtype=getattr(torch, spec.dtype),
    )


def subject(spec: CellSpec, batch: Callable[[], Batch], device: torch.device) -> Subject:
    """A cell's model in training, with the batch of its steps."""
    return Subject.make(lambda: build_model(spec), batch, causal=spec.causal, device=device)


class Prediction:
    """Predictions around one cell, each length and batch of which is gone through once."""

    def __init__(self, spec: CellSpec) -> None:
        self.spec = spec
        self._known: dict[tuple[int, int], StepFigures] = {}

    def predict(self, *, seq_len: int | None = None, batch_size: int | None = None) -> StepFigures:
        """What a training step of the cell takes, from fake tensors on the CPU's kernels, cut as its own
        device's work is."""
        key = seq_len or self.spec.seq_len, batch_size or self.spec.batch_size
        if key not in self._known:
            spec = replace(self.spec, seq_len=key[0], batch_size=key[1])

            def blank() -> Batch:
                tokens = torch.zeros(spec.batch_size, spec.seq_len, dtype=torch.int64)
                return Batch(tokens, tokens.clone())

            self._known[key] = step.predicted(lambda: subject(spec, blank, CPU))
        return self._known[key]

    def longest_seq_len(self, budget: int) -> int:
        """The longest sequence, in whole `TOKENS` up to `MOST_TOKENS`, whose step fits; 0 for none."""

        def peak(n: int) -> int:
            return self.predict(seq_len=n * TOKENS).peak_bytes

        return TOKENS * largest(peak, budget, MOST_TOKENS // TOKENS)

    def largest_batch_size(self, budget: int) -> int:
        """The most sequences, up to `MOST_SEQUENCES`, whose step fits; 0 for none."""
        return largest(lambda n: self.predict(batch_size=n).peak_bytes, budget, MOST_SEQUENCES)
