"""How much is worked on at a time, by type of device.

On a CPU, what a piece of work makes should stay in the cache. An accelerator is given its work in launches
of some microseconds each, and fills its cores with the large ones alone: pieces there are larger.

Functions take the type of device as an argument and never ask a tensor: a plan's tensors are fakes on the
CPU, whatever the device that is planned for. A layer knows it (`SequenceMixer.device_type`).
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """One size for the CPU, and one for anything else."""

    cpu: int
    accelerator: int

    def on(self, device_type: str) -> int:
        """The size for a type of device."""
        return self.cpu if device_type == "cpu" else self.accelerator
