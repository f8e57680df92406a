"""State of an NVIDIA device: clock, temperature, power, memory, throttling and other processes.

It is read with NVML, the library behind `nvidia-smi`, through its official Python binding (nvidia-ml-py). A
value that the driver does not report is None, never 0, and `gpu_reason` says why. torch is imported only to
look up a device's UUID.
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
"""Reasons for a reduced clock of a busy device: the suffix of NVML's constant (after nvmlClocksEventReason) →
the text in the record. NVML's other reasons are an idle device and clocks that a user has set."""
ENERGY = "energy_joules_per_token"
"""The record key for which the energy counter is read."""
NOT_AVAILABLE = "not available"
NOT_LISTED = "no process with this id is listed; in a container the driver uses another id"


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """The state of one device at one time, by record key."""

    gpu_clock_mhz: int | None = None
    """Clock of the streaming multiprocessors."""
    gpu_memory_clock_mhz: int | None = None
    gpu_temperature_celsius: int | None = None
    gpu_power_watts: float | None = None
    gpu_power_limit_watts: float | None = None
    """The limit that the driver enforces."""
    gpu_throttling: str | None = None
    """The reasons for a reduced clock (values of `REASONS`), or `none`."""
    gpu_foreign_processes: int | None = None
    """Number of other processes with a context on the device."""
    nvml_process_bytes: int | None = None
    """Device memory of this process, including its context."""
    nvml_device_bytes: int | None = None
    """Device memory in use by all processes."""
    gpu_reason: str | None = None
    """Why values are None: a list of `key: the driver's answer`."""
    joules: float | None = None
    """Energy consumption since the driver was loaded; only differences are useful, so it is not a record key.
    The driver updates its counter every 20 to 100 ms."""

    def figures(self) -> dict[str, Any]:
        """Return the values by record key."""
        return {key: value for key, value in asdict(self).items() if key != "joules"}


UNKNOWN_STATE = DeviceState()
"""The state of a device that is not from NVIDIA."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a whole device, for all processes."""

    used_bytes: int
    free_bytes: int


@contextmanager
def _device(uuid: str) -> Iterator[tuple[Any, Any]]:
    """Yield the NVML binding and a device's handle. Raises NVMLError if no driver supports the device."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    finally:
        pynvml.nvmlShutdown()


def uuid(device: str) -> str | None:
    """Return the driver's UUID of a device, None if it is not an NVIDIA device. Initialises the device."""
    import torch

    kind = torch.device(device)
    if kind.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    return f"GPU-{torch.cuda.get_device_properties(kind).uuid}"


def read(device: torch.device) -> DeviceState:
    """Return the state of a device that this process uses; `UNKNOWN_STATE` if it is not from NVIDIA."""
    name = uuid(str(device)) if device.type == "cuda" else None
    return UNKNOWN_STATE if name is None else state(name)


def state(uuid: str) -> DeviceState:
    """Return the state that the driver reports for a device that this process uses."""
    import pynvml

    try:
        with _device(uuid) as (nvml, handle):
            return _state(nvml, handle)
    except pynvml.NVMLError as error:
        return DeviceState(gpu_reason=str(error))


def _state(nvml: Any, handle: Any) -> DeviceState:
    missing: dict[str, str] = {}
    unavailable = {nvml.NVML_VALUE_NOT_AVAILABLE_uint.value, nvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value}

    def used(device: Any) -> int:
        return int(nvml.nvmlDeviceGetMemoryInfo(device).used)

    def query(key: str, question: Callable[..., int], *more: Any) -> int | None:
        try:
            answer = question(handle, *more)
        except nvml.NVMLError as error:
            missing[key] = str(error)
            return None
        if answer in unavailable:
            missing[key] = NOT_AVAILABLE
            return None
        return answer

    reasons = query("gpu_throttling", nvml.nvmlDeviceGetCurrentClocksEventReasons)
    milliwatts = query("gpu_power_watts", nvml.nvmlDeviceGetPowerUsage)
    limit = query("gpu_power_limit_watts", nvml.nvmlDeviceGetEnforcedPowerLimit)
    millijoules = query(ENERGY, nvml.nvmlDeviceGetTotalEnergyConsumption)
    reported = {
        "gpu_clock_mhz": query("gpu_clock_mhz", nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "gpu_memory_clock_mhz": query(
            "gpu_memory_clock_mhz", nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM
        ),
        "gpu_temperature_celsius": query(
            "gpu_temperature_celsius", nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU
        ),
        "nvml_device_bytes": query("nvml_device_bytes", used),
    }
    foreign, own_bytes = _processes(nvml, handle, missing)
    return DeviceState(
        **reported,
        gpu_power_watts=None if milliwatts is None else milliwatts / 1000,
        gpu_power_limit_watts=None if limit is None else limit / 1000,
        gpu_throttling=None if reasons is None else _throttling_reasons(nvml, reasons),
        gpu_foreign_processes=foreign,
        nvml_process_bytes=own_bytes,
        joules=None if millijoules is None else millijoules / 1000,
        gpu_reason="; ".join(f"{key}: {why}" for key, why in missing.items()) or None,
    )


def _processes(nvml: Any, handle: Any, missing: dict[str, str]) -> tuple[int | None, int | None]:
    """Return the number of other processes on the device, and this process's memory on it."""
    try:
        listed = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError as error:
        missing |= dict.fromkeys(("gpu_foreign_processes", "nvml_process_bytes"), str(error))
        return None, None
    if not listed:
        missing |= dict.fromkeys(("gpu_foreign_processes", "nvml_process_bytes"), "no process is listed")
        return None, None
    # One of them is this process, although in a container the driver may list it under another id.
    ours = [process for process in listed if process.pid == os.getpid()]
    used = ours[0].usedGpuMemory if ours else None
    if used is None:
        missing["nvml_process_bytes"] = NOT_AVAILABLE if ours else NOT_LISTED
    return len(listed) - 1, used


def _throttling_reasons(nvml: Any, reasons: int) -> str:
    active = [
        text for name, text in REASONS.items() if reasons & getattr(nvml, f"nvmlClocksEventReason{name}")
    ]
    return ", ".join(active) or "none"


def memory(uuid: str) -> Memory | None:
    """Return a device's memory; None if the driver does not report it."""
    import pynvml

    try:
        with _device(uuid) as (nvml, handle):
            reported = nvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return None
    return Memory(used_bytes=reported.used, free_bytes=reported.free)
