"""How a gate fails, and the figure that it fails by."""

from __future__ import annotations

import torch


class GateFailed(Exception):
    """A variant did not pass; the message names the gate and its figure."""


def largest(values: list[float]) -> float:
    """The largest value; NaN where there is one, which `max` would pass over."""
    return torch.tensor(values, dtype=torch.float64).max().item()
