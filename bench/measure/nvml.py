"""What the driver says of an NVIDIA device: its clock, heat and power, what holds it back, who else is on it.

By NVML, the library behind `nvidia-smi`, through its own Python binding (nvidia-ml-py). What the driver does
not tell is None, never 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")

REASONS = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "heat",
    "HwThermalSlowdown": "heat at the hardware's limit",
    "HwPowerBrakeSlowdown": "power brake",
}
"""What lowers the clock of a device that has work: NVML's name, after nvmlClocksEventReason, and ours. Its
other reasons are a device without work and clocks that someone has set."""


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """One device at one time, by the record's keys."""

    gpu_clock_mhz: int | None = None
    """Of the streaming multiprocessors."""
    gpu_temperature_celsius: int | None = None
    gpu_power_watts: float | None = None
    gpu_throttling: str | None = None
    """What lowers the clock, in the words of `REASONS`, or none."""
    gpu_foreign_processes: int | None = None
    """Processes with a context on the device, beside this one."""
    nvml_process_bytes: int | None = None
    """Memory of the device that this process holds, its context included."""


UNTOLD = DeviceState()


def read(device: torch.device) -> DeviceState:
    """The device's state; `UNTOLD` where no NVIDIA driver answers for it."""
    if device.type != "cuda":
        return UNTOLD
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return UNTOLD
    try:
        uuid = torch.cuda.get_device_properties(device).uuid
        return state(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except pynvml.NVMLError:
        return UNTOLD
    finally:
        pynvml.nvmlShutdown()


def state(nvml: Any, handle: Any) -> DeviceState:
    """What the module `nvml` (pynvml, or what stands in for it) tells of a device."""

    def ask(question: Callable[..., T], *more: Any) -> T | None:
        try:
            return question(handle, *more)
        except nvml.NVMLError:
            return None

    milliwatts = ask(nvml.nvmlDeviceGetPowerUsage)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons)
    processes = ask(nvml.nvmlDeviceGetComputeRunningProcesses) or []
    ours = [process for process in processes if process.pid == os.getpid()]
    return DeviceState(
        gpu_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        gpu_temperature_celsius=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        gpu_power_watts=None if milliwatts is None else milliwatts / 1000,
        gpu_throttling=None if reasons is None else _in_words(nvml, reasons),
        # One of them is this process, whatever number the driver has for it: in a container it is another.
        gpu_foreign_processes=len(processes) - 1 if processes else None,
        nvml_process_bytes=ours[0].usedGpuMemory if ours else None,
    )


def _in_words(nvml: Any, reasons: int) -> str:
    given = [
        words for name, words in REASONS.items() if reasons & getattr(nvml, f"nvmlClocksEventReason{name}")
    ]
    return ", ".join(given) or "none"
