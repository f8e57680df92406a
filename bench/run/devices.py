"""The devices of this machine, and which one a cell's process may use.

A cell asks for a kind of device, such as `cuda`, and a sweep distributes its cells over all visible devices
of that kind. The process of a cell sees only its own device, so that the cell's configuration, and with it
the cell's id, does not depend on which device measures it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

from bench.process import forkserver

CUDA_VARIABLE, HIP_VARIABLE = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Device:
    """A device of this machine."""

    kind: str
    """The value of the knob `device`."""
    uuid: str | None = None
    """The driver's UUID; None for the CPU, and if the driver reports none."""
    variable: str | None = None
    """The environment variable that selects devices of this kind."""
    value: str | None = None
    """The variable's value that leaves only this device: an index, or the identifier that the user gave. In
    the latter case it may be a UUID, also of a part of a device (MIG)."""

    @property
    def identity(self) -> str:
        """Identifies the device among all of this machine, whatever a process sees of them."""
        return self.uuid or self.kind

    def select(self) -> None:
        """Hide all other devices from this process, which must not have used one yet."""
        if self.variable is not None and self.value is not None:
            os.environ[self.variable] = self.value


CPU = Device("cpu")


def devices_of(kind: str) -> tuple[Device, ...]:
    """Return the visible devices of a kind, at least one; the process of a cell reports if there is none."""
    return (CPU,) if kind == CPU.kind else _found(kind) or (Device(kind),)


@cache
def _found(kind: str) -> tuple[Device, ...]:
    """Return the devices that the driver reports. A child process asks it, because torch initialises a device
    to read its UUID and would keep memory on it while this process lives."""
    return forkserver.run_in_child(_visible, kind)


def _visible(kind: str) -> tuple[Device, ...]:
    import torch

    if kind != "cuda" or not torch.cuda.is_available():
        return ()
    count = torch.cuda.device_count()
    variable, values = selection(count, is_hip=torch.version.hip is not None)
    uuids = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
    return tuple(
        Device(kind, uuid, variable, value) for uuid, value in zip(uuids, values[:count], strict=True)
    )


def selection(count: int, *, is_hip: bool) -> tuple[str, list[str]]:
    """Return the environment variable that selects devices, and its value for each visible device.

    A value that the user has set is divided into its entries: indices would be wrong if it selects devices by
    UUID or reorders them. ROCm reads both variables.
    """
    names = (HIP_VARIABLE, CUDA_VARIABLE) if is_hip else (CUDA_VARIABLE,)
    for name in names:
        if given := os.environ.get(name):
            return name, [entry.strip() for entry in given.split(",")]
    return names[0], [str(index) for index in range(count)]
