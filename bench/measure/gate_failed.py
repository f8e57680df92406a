"""The exception of a failed gate, and the maximum of a gate's errors."""

from __future__ import annotations

import torch


class GateFailed(Exception):
    """A variant did not pass a gate; the message contains the gate and the error."""


def largest(values: list[float]) -> float:
    """Return the largest value, or NaN if a value is NaN, which Python's `max` may ignore."""
    return torch.tensor(values, dtype=torch.float64).max().item()
