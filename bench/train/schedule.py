"""The budgets of a training, and the learning rate of each step.

Two schedules start with a linear warm-up:

- *cosine*: then a cosine down to a tenth at the end of the budget.
- *wsd* (warm-up, stable, decay; Hu 2024, arXiv:2404.06395, §4): then the whole rate, and in the last fifth of
  the budget a decay to 0 with 1 − √x (Hägele 2024, arXiv:2405.18392, §3). Before its decay, training does not
  depend on its budget. Therefore one run serves several budgets: for each smaller one, a branch decays and is
  evaluated, and the run continues as if there had been no branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.config.spec import MeasureSpec

WARM_UP_SHARE = 0.1
"""Of the budget; with several budgets, of the smallest one."""
DECAY_SHARE = 0.2
FIRST_SHARE = 0.01
"""Assumed share of a budget of seconds for the first step, whose duration is not yet known."""


def cosine_factor(done: float, step_share: float) -> float:
    """Return the factor of the learning rate for a step that uses `step_share` of the budget after the share
    `done` is used."""
    if done < WARM_UP_SHARE:
        return min(1.0, (done + step_share) / WARM_UP_SHARE)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The budget of a training: a number of steps or, if `steps` is None, seconds of wall-clock time."""

    steps: int | None = None
    seconds: float = math.inf
    smaller: tuple[int, ...] = ()
    """Steps of the smaller budgets that the run serves too, ascending."""
    is_wsd: bool = False
    """The schedule: wsd, else cosine. Only for steps."""

    @classmethod
    def of(cls, measure: MeasureSpec, *, step_tokens: int, step_flops: int) -> Budget:
        """Return the budget of the measure; tokens and FLOPs are rounded up to whole steps.

        `step_flops` are the algorithmic FLOPs of the variant. Therefore a budget of FLOPs gives every variant
        the same amount of work by its own formula, independent of the FLOPs that its implementation executes.
        """
        if measure.train_budget == "seconds":
            return cls(seconds=measure.train_seconds)
        each = step_tokens if measure.train_budget == "tokens" else step_flops
        halves = [measure.train_amount / 2**k for k in range(measure.train_budgets)]
        *smaller, steps = sorted({max(1, math.ceil(amount / each)) for amount in halves})
        return cls(steps=steps, smaller=tuple(smaller), is_wsd=measure.schedule == "wsd")

    @property
    def all_steps(self) -> tuple[int, ...]:
        """The steps of all budgets, ascending; empty for seconds."""
        return () if self.steps is None else (*self.smaller, self.steps)

    @property
    def smallest(self) -> Budget:
        """The budget without the larger ones."""
        if not self.smaller:
            return self
        return Budget(steps=self.smaller[0], is_wsd=self.is_wsd)

    @property
    def steps_of_branches(self) -> int:
        """Steps of the decays of the smaller budgets, in addition to `steps`."""
        return sum(end - decay_start(end) for end in self.smaller)

    def wsd_factor(self, step: int, end: int) -> float:
        """Return the factor of the learning rate for `step`, counted from 0, on the way to the budget of
        `end` steps."""
        warm_up = math.ceil(WARM_UP_SHARE * self.all_steps[0])
        start = decay_start(end)
        if step < start:
            return min(1.0, (step + 1) / warm_up)
        return 1 - math.sqrt((step - start) / (end - start))


def decay_start(end: int) -> int:
    """Return the step at which the decay of wsd starts for a budget of `end` steps."""
    return end - max(1, round(DECAY_SHARE * end))
