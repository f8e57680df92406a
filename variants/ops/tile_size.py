"""Sizes of the pieces into which a computation is divided, by type of device.

On a CPU the temporaries of a piece should stay in cache. On an accelerator each launch costs some
microseconds, and only large pieces use all cores, so pieces are larger.

Functions get the type of device as an argument and do not read it from a tensor: the tensors of a plan are
fake tensors of the CPU, also if the plan is for another device. A layer has `SequenceMixer.device_type`.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """A size for the CPU, and a size for all other devices."""

    cpu: int
    accelerator: int

    def on(self, device_type: str) -> int:
        """The size for a type of device, such as "cuda"."""
        return self.cpu if device_type == "cpu" else self.accelerator
