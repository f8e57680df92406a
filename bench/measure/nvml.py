"""What the driver says of an NVIDIA device: clock, heat, power and memory, what holds it back, who is on it.

By NVML, the library behind `nvidia-smi`, through its own Python binding (nvidia-ml-py). What the driver does
not tell is None, never 0, and `gpu_reason` says why. Imports torch only to learn a device's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REASONS = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "heat",
    "HwThermalSlowdown": "heat at the hardware's limit",
    "HwPowerBrakeSlowdown": "power brake",
}
"""What lowers the clock of a device that has work: NVML's name, after nvmlClocksEventReason, and ours. Its
other reasons are a device without work and clocks that someone has set."""
ENERGY = "energy_joules_per_token"
"""The record's key that the counter of energy is read for."""
NOT_AVAILABLE = "not available"
NOT_LISTED = "no process of this number is listed; in a container the driver has another for it"


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
    nvml_device_bytes: int | None = None
    """Memory of the device that is in use, whoever holds it."""
    gpu_reason: str | None = None
    """Why any of these is None: `key: what the driver answered`, one after the other."""
    joules: float | None = None
    """Energy drawn since the driver was loaded; of use as a difference, and no key of a record. The driver's
    counter moves every 20 to 100 ms."""

    def figures(self) -> dict[str, Any]:
        """By the record's keys."""
        return {key: value for key, value in asdict(self).items() if key != "joules"}


UNTOLD = DeviceState()
"""Of what is no NVIDIA device."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of a whole device, whoever holds it."""

    used_bytes: int
    free_bytes: int


@contextmanager
def _device(uuid: str) -> Iterator[tuple[Any, Any]]:
    """The binding and its handle of a device. Raises its NVMLError where no driver answers for it."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    finally:
        pynvml.nvmlShutdown()


def uuid(device: str) -> str | None:
    """The driver's name of a device, None for what is no NVIDIA device. Begins to use the device."""
    import torch

    kind = torch.device(device)
    if kind.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    return f"GPU-{torch.cuda.get_device_properties(kind).uuid}"


def read(device: torch.device) -> DeviceState:
    """The state of a device that this process computes on; `UNTOLD` for one that is not NVIDIA's."""
    name = uuid(str(device)) if device.type == "cuda" else None
    return UNTOLD if name is None else state(name)


def state(uuid: str) -> DeviceState:
    """What the driver tells of a device that this process computes on."""
    import pynvml

    try:
        with _device(uuid) as (nvml, handle):
            return _state(nvml, handle)
    except pynvml.NVMLError as error:
        return DeviceState(gpu_reason=str(error))


def _state(nvml: Any, handle: Any) -> DeviceState:
    untold: dict[str, str] = {}
    unavailable = {nvml.NVML_VALUE_NOT_AVAILABLE_uint.value, nvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value}

    def used(device: Any) -> int:
        return int(nvml.nvmlDeviceGetMemoryInfo(device).used)

    def ask(key: str, question: Callable[..., int], *more: Any) -> int | None:
        try:
            answer = question(handle, *more)
        except nvml.NVMLError as error:
            untold[key] = str(error)
            return None
        if answer in (
            nvml.NVML_VALUE_NOT_AVAILABLE_uint.value,
            nvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value,
        ):
            untold[key] = NOT_AVAILABLE
            return None
        return answer

    reasons = ask("gpu_throttling", nvml.nvmlDeviceGetCurrentClocksEventReasons)
    milliwatts = ask("gpu_power_watts", nvml.nvmlDeviceGetPowerUsage)
    millijoules = ask(ENERGY, nvml.nvmlDeviceGetTotalEnergyConsumption)
    told = {
        "gpu_clock_mhz": ask("gpu_clock_mhz", nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "gpu_temperature_celsius": ask(
            "gpu_temperature_celsius", nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU
        ),
        "nvml_device_bytes": ask(
            "nvml_device_bytes", lambda device: nvml.nvmlDeviceGetMemoryInfo(device).used
        ),
    }
    foreign, ours = _processes(nvml, handle, untold)
    return DeviceState(
        **told,
        gpu_power_watts=None if milliwatts is None else milliwatts / 1000,
        gpu_throttling=None if reasons is None else _in_words(nvml, reasons),
        gpu_foreign_processes=foreign,
        nvml_process_bytes=ours,
        joules=None if millijoules is None else millijoules / 1000,
        gpu_reason="; ".join(f"{key}: {why}" for key, why in untold.items()) or None,
    )


def _processes(nvml: Any, handle: Any, untold: dict[str, str]) -> tuple[int | None, int | None]:
    """How many others have a context on the device, and the memory of this process there."""
    try:
        listed = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError as error:
        untold |= dict.fromkeys(("gpu_foreign_processes", "nvml_process_bytes"), str(error))
        return None, None
    if not listed:
        untold |= dict.fromkeys(("gpu_foreign_processes", "nvml_process_bytes"), "no process is listed")
        return None, None
    # One of them is this process, whatever number the driver has for it: in a container it is another.
    ours = [process for process in listed if process.pid == os.getpid()]
    held = ours[0].usedGpuMemory if ours else None
    if held is None:
        untold["nvml_process_bytes"] = NOT_AVAILABLE if ours else NOT_LISTED
    return len(listed) - 1, held


def _in_words(nvml: Any, reasons: int) -> str:
    given = [
        words for name, words in REASONS.items() if reasons & getattr(nvml, f"nvmlClocksEventReason{name}")
    ]
    return ", ".join(given) or "none"


def memory(uuid: str) -> Memory | None:
    """A device's memory; None where the driver does not tell it."""
    import pynvml

    try:
        with _device(uuid) as (nvml, handle):
            told = nvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return None
    return Memory(used_bytes=told.used, free_bytes=told.free)
