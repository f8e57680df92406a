"""How much is worked on at a time, which differs by device.

On a CPU, what a piece of work makes should stay in the cache. An accelerator is given its work in launches
of some microseconds each, and fills its cores with the large ones alone: pieces there are larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_planned: list[str] = []


@contextmanager
def planned_for(device_type: str) -> Iterator[None]:
    """While inside, all work is cut as on this kind of device: a plan's tensors are fakes on the CPU."""
    _planned.append(device_type)
    try:
        yield
    finally:
        _planned.pop()


class Sizes(NamedTuple):
    """One size for the CPU, and one for anything else."""

    cpu: int
    accelerator: int

    def on(self, device: torch.device) -> int:
        """The size for a device."""
        return self.cpu if (_planned[-1] if _planned else device.type) == "cpu" else self.accelerator
