"""A trace of one training step by torch's profiler, and a table of its costliest operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure.timing import synchronize
from bench.records import make_folder, profile_path_of

MOST = 10
"""Operations in the table."""


def write(work: Callable[[], object], device: torch.device, folder: Path, cell_id: str) -> None:
    """Run `work` once under the profiler; writes the trace, which chrome://tracing and Perfetto open, and the
    table of the operations with the largest time of their own."""
    accelerator = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}.get(device.type)
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([accelerator] if accelerator else [])]) as profiler:
        work()
        synchronize(device)
    path = profile_path_of(folder, cell_id)
    make_folder(path.parent)
    profiler.export_chrome_trace(str(path.with_suffix(".json.gz")))
    path.write_text(_table(profiler.key_averages(), on_device=accelerator is not None), encoding="utf-8")


def _table(operations: Any, *, on_device: bool) -> str:
    """The costliest operations as a table: on an accelerator by its own time, else by that of the CPU."""

    def seconds(operation: Any) -> float:
        return 1e-6 * float(operation.self_device_time_total if on_device else operation.self_cpu_time_total)

    found = [operation for operation in operations if seconds(operation) > 0]
    total = sum(map(seconds, found))
    lines = ["| operation | calls | ms | share |", "|---|---:|---:|---:|"]
    for operation in sorted(found, key=seconds, reverse=True)[:MOST]:
        time = seconds(operation)
        lines.append(f"| `{operation.key}` | {operation.count} | {1e3 * time:.3f} | {time / total:.1%} |")
    return "\n".join([*lines, f"| all | | {1e3 * total:.3f} | 100.0% |", ""])
