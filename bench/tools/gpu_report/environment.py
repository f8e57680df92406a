"""The environment of a run on an accelerator: versions, clocks, and the packages that are missing."""

from __future__ import annotations

import os
import platform
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.run import provenance
from bench.run.devices import Device

OPTIONAL = ("triton", "xformers", "flash-attn", "flash-linear-attention", "fla-core", "causal-conv1d")
"""Packages with kernels; what a cell needs of them is the `missing` of each implementation."""


def packages(names: Iterable[str]) -> dict[str, str | None]:
    """Return the installed version of each package; None if it is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def requirements(pyproject: Path) -> list[str]:
    """Return the names of the packages that the harness requires; empty without the file."""
    if not pyproject.exists():
        return []
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in project["dependencies"])
    return [name.group() for name in names if name]


def facts(report: Callable[[dict[str, str]], None], device: Device) -> None:
    """Report the facts about a device, each as text; runs in a child process, because it uses the device."""
    import torch

    device.select()
    report(
        {
            "python": f"{platform.python_version()} ({sys.executable})",
            "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}",
            "CPU": f"{provenance.cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        }
    )
    if device.kind == "cpu":
        return
    from bench.measure import nvml

    module = torch.get_device_module(device.kind)
    square = torch.ones(4096, 4096, device=device.kind, dtype=torch.bfloat16)
    for _ in range(20):
        square @ square
    busy = nvml.read(torch.device(device.kind))
    module.synchronize()
    capability = module.get_device_capability()
    total = module.get_device_properties(0).total_memory
    report(
        {
            "device": f"{module.get_device_name()}, capability {capability}, {total / 2**30:.1f} GiB, "
            f"one of {module.device_count()} visible to this process",
            "cuDNN": str(torch.backends.cudnn.version()),
            "attention kernels of torch": ", ".join(_sdpa(torch.backends.cuda)),
            "TF32 of matrix products": str(torch.backends.cuda.matmul.allow_tf32),
            "TF32 of cuDNN": str(torch.backends.cudnn.allow_tf32),
            "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default"),
            **{key: str(value) for key, value in busy.figures().items() if value is not None},
        }
    )
    report({"driver": _driver()})


def _sdpa(cuda: Any) -> list[str]:
    kinds = ("flash", "cudnn", "mem_efficient", "math")
    return [kind for kind in kinds if getattr(cuda, f"{kind}_sdp_enabled")()]


def _driver() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)
    except pynvml.NVMLError as error:
        return f"unknown: {error}"


def launch_time(report: Callable[[float | None], None], folder: Path, device: Device) -> None:
    """Report the host's time for a launch, as cells of an experiment in `folder` measure it."""
    import torch

    from bench.measure.device_time import launch_seconds

    device.select()
    kind = torch.device(device.kind)
    name = None if device.kind == "cpu" else torch.get_device_module(kind).get_device_name(kind)
    report(launch_seconds(folder, kind, name))
