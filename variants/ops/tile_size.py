"""What differs by device: how much is worked on at a time, and which implementation `auto` stands for.

On a CPU, what a piece of work makes should stay in the cache. An accelerator is given its work in launches
of some microseconds each, and fills its cores with the large ones alone: pieces there are larger.

A variant asks `device_type` and never a tensor: a plan's tensors are fakes on the CPU, whatever the device
that is planned for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_planned: list[str] = []


@contextmanager
def planned_for(device_type: str) -> Iterator[None]:
    """While inside, all work is done as on this kind of device, wherever its tensors are."""
    _planned.append(device_type)
    try:
        yield
    finally:
        _planned.pop()


def device_type(device: torch.device) -> str:
    """The kind of device that work on tensors of this one is for."""
    return _planned[-1] if _planned else device.type


class Sizes(NamedTuple):
    """One size for the CPU, and one for anything else."""

    cpu: int
    accelerator: int

    def on(self, device: torch.device) -> int:
        """The size for a device."""
        return self.cpu if device_type(device) == "cpu" else self.accelerator
