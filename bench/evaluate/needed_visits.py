"""Visits that tokens need, where the depth schedule decides this for each token: early exit and halting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.config.spec import CellSpec
from bench.model.language_model import LanguageModel
from variants.base import PathOut, Workload


class NeededVisits:
    """Numbers of tokens by the visits that they need, over all windows that the model has processed."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.counts: Tensor | None = None
        """(N + 1,) tokens that need 0, 1, …, N visits, on the device; None if the schedule is the same for
        every token."""

    def add(self, path: nn.Module, given: Any, out: PathOut) -> None:
        """A hook of the model's path."""
        if out.visits is None:
            return
        counts = torch.bincount(out.visits.flatten(), minlength=len(self.model.visits) + 1)
        self.counts = counts if self.counts is None else self.counts + counts

    def shares(self) -> list[float] | None:
        """Of each visit, the share of the tokens that need it."""
        if self.counts is None:
            return None
        at_least = self.counts.flip(0).cumsum(0).flip(0)
        return [float(share) for share in at_least[1:] / at_least[0]]

    def figures(self, spec: CellSpec) -> dict[str, Any]:
        """Return the figures by the keys of the record; none if every token needs all visits."""
        shares = self.shares()
        if shares is None:
            return {}
        flops = needed_flops(self.model, spec.workload(), shares)
        return {"visits_per_token": sum(shares), "flops_needed_forward": round(flops)}


@contextmanager
def counting(model: LanguageModel) -> Iterator[NeededVisits]:
    """Count the visits that tokens need in the forward passes inside the context."""
    needed = NeededVisits(model)
    hook = model.path.register_forward_hook(needed.add)
    try:
        yield needed
    finally:
        hook.remove()


def needed_flops(model: LanguageModel, work: Workload, shares: Sequence[float]) -> float:
    """Return the part of the model's cost that tokens need if a share of them needs each visit, and the exit
    after it.

    It is an estimate: a visit of a share of the tokens counts this share of the FLOPs of all.
    """
    visits = [model.cost_of_visit(place, work).total for place in range(len(model.visits))]
    needed = sum(share * flops for share, flops in zip(shares, visits, strict=True))
    rest: float = model.cost(work).total - sum(visits)
    if exits := len(model.depth_schedule.exit_weights()):
        read_out = model.cost_of_tables(work, 0).parts["output"] / (1 + exits)
        rest += (sum(shares) - (1 + exits)) * read_out
    return needed + rest
