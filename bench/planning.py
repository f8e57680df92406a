"""What a cell will take, without its hardware, and the largest that fits into a memory budget.

A peak is close to affine in the length of a sequence and in the number of sequences, so a search needs
few predictions: two say where to look, a third and a fourth confirm it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from bench.config import CellSpec
from bench.measure import step
from bench.measure.step import StepFigures, Subject
from bench.model import LanguageModel
from bench.tasks.base import Batch
from variants.base import Flops

CPU = torch.device("cpu")
TOKENS = 1024
"""Lengths are searched in multiples of this."""
LONGEST_RUN = 2**14
"""Tokens up to which a step is gone through, as fake tensors; beyond, figures are extrapolated."""
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
    guess, halving = min(2, most), False
    while failing - fitting > (margin := max(1, int(CLOSE * fitting))):
        before = failing - fitting
        if fits(guess):
            fitting = guess
        else:
            failing = guess
        halving = not halving and 2 * (failing - fitting) > before  # so that the bracket does shrink
        guess = _middle(fitting, failing) if halving else _crossing(known, budget, fitting, failing, margin)
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
    variant, config, dims = spec.attention()
    _, task_config, _ = spec.task()
    torch.manual_seed(spec.replicate)
    return LanguageModel(
        variant,
        config,
        replace(dims, batch_size=1),
        depth=spec.depth,
        ff_mult=spec.model.ff_mult,
        ff_chunks=spec.model.ff_chunks,
        dropout=spec.model.dropout,
        vocabulary=task_config.vocabulary,
        activations=spec.activations,
        dtype=getattr(torch, spec.dtype),
    )


def subject(spec: CellSpec, batch: Callable[[], Batch], device: torch.device) -> Subject:
    """A cell's model in training, with the batch of its steps."""
    return Subject.make(lambda: build_model(spec), batch, causal=spec.causal, device=device)


_SIZES = ("param_bytes", "grad_bytes", "optimizer_bytes", "activation_bytes")


class Plan:
    """Predictions around one cell, each length and batch of which is gone through once."""

    def __init__(self, spec: CellSpec) -> None:
        self.spec = spec
        self._known: dict[tuple[int, int], StepFigures] = {}

    def predict(self, *, seq_len: int | None = None, batch_size: int | None = None) -> StepFigures:
        """What a training step of the cell takes, from fake tensors on the CPU's kernels.

        Past `LONGEST_RUN` tokens, bytes follow the line through the figures at that length and at half of
        it, each part of each phase's peak by itself, and FLOPs follow the formula, projections and attention
        each in proportion: a variant that works in pieces would otherwise be gone through for minutes.
        """
        spec = self._changed(seq_len, batch_size)
        if spec.seq_len <= LONGEST_RUN:
            return self._run(spec)
        forward, whole = self._flops(spec)
        return replace(self._line(spec), flops_forward=forward, flops_step=whole)

    def peak_bytes(self, *, seq_len: int | None = None, batch_size: int | None = None) -> int:
        """The peak alone, for searches."""
        spec = self._changed(seq_len, batch_size)
        return (self._run(spec) if spec.seq_len <= LONGEST_RUN else self._line(spec)).peak_bytes

    def _changed(self, seq_len: int | None, batch_size: int | None) -> CellSpec:
        return replace(
            self.spec, seq_len=seq_len or self.spec.seq_len, batch_size=batch_size or self.spec.batch_size
        )

    def _flops(self, spec: CellSpec) -> tuple[int, int]:
        """(forward, step): projections and attention as they are executed, multiples of their formulas."""
        specs = [replace(spec, seq_len=n) for n in (LONGEST_RUN // 2, LONGEST_RUN, spec.seq_len)]
        *known, wanted = np.array([_formula(s) for s in specs], dtype=np.float64)
        scale = known[-1].max()

        def executed(key: str) -> int:
            counted = [getattr(self._run(s), key) for s in specs[:2]]
            multiples, *_ = np.linalg.lstsq(np.array(known) / scale, np.array(counted) / scale, rcond=1e-6)
            return round(float(wanted @ multiples))

        return executed("flops_forward"), executed("flops_step")

    def _line(self, spec: CellSpec) -> StepFigures:
        """Bytes at the cell's length, FLOPs still at `LONGEST_RUN`."""
        near, far = (self._run(replace(spec, seq_len=n)) for n in (LONGEST_RUN // 2, LONGEST_RUN))
        further = (spec.seq_len - LONGEST_RUN) / (LONGEST_RUN // 2)

        def line(a: int, b: int) -> int:
            return round(b + further * (b - a))

        return replace(
            far,
            peaks={
                phase: {label: line(near.peaks[phase][label], size) for label, size in split.items()}
                for phase, split in far.peaks.items()
            },
            **{key: line(getattr(near, key), getattr(far, key)) for key in _SIZES},
        )

    def _run(self, spec: CellSpec) -> StepFigures:
        key = spec.seq_len, spec.batch_size

        def blank() -> Batch:
            tokens = torch.zeros(spec.batch_size, spec.seq_len, dtype=torch.int64)
            return Batch(tokens, tokens.clone())

        if key not in self._known:
            self._known[key] = step.predicted(lambda: subject(spec, blank, CPU))
        return self._known[key]

    def longest_seq_len(self, budget: int) -> int:
        """The longest sequence, in whole `TOKENS` up to `MOST_TOKENS`, whose step fits; 0 for none."""

        def peak(n: int) -> int:
            return self.peak_bytes(seq_len=n * TOKENS)

        return TOKENS * largest(peak, budget, MOST_TOKENS // TOKENS)

    def largest_batch_size(self, budget: int) -> int:
        """The most sequences, up to `MOST_SEQUENCES`, whose step fits; 0 for none."""
        return largest(lambda n: self.peak_bytes(batch_size=n), budget, MOST_SEQUENCES)


def _formula(spec: CellSpec) -> Flops:
    """Algorithmic forward FLOPs of the cell's model: of projections and of attention."""
    _, _, dims = spec.attention()
    with torch.device("meta"):
        model = build_model(spec)
    return model.flops(dims, causal=spec.causal)
