"""The roofline of a machine: its peak rates of matrix products and of copies, measured once per run.

Utilisation is relative to the peak, so the peak must be an upper bound: it is the best of several sizes and
repeats, while the time of a cell is a median. If the speed of a machine varies, it may still be faster when a
cell runs than when the roofline was measured. Therefore a cell above the roofline measures the roofline again
immediately and keeps the better value. If the cell is still above it, it is an error, without a tolerance.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from bench.measure.cached import load_or_measure, path_of
from bench.measure.timing import synchronize
from bench.records import write_atomically

SIZES = (512, 1024, 2048, 4096, 8192)
"""Sizes of square matrices, tried in order until one product takes `LONG_SECONDS`: small matrices do not
saturate an accelerator, and large ones only take more time on a CPU."""
LONG_SECONDS = 0.02
COPY_BYTES = 2**27
"""Larger than all caches."""
MIN_REPEATS = 5
"""Minimum repeats of each product and of the copy."""
SECONDS = 0.15
"""Minimum wall-clock time of the repeats of each."""
MAX_REMEASUREMENTS = 3
"""Maximum number of times that a cell above the roofline measures it again."""


class AboveRoofline(Exception):
    """A cell exceeds the machine's peak rate; the message contains the figures."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The measured peak rates of a machine, by record key."""

    peak_flops_per_second: float
    """FLOPs of matrix products, 2 per multiply-accumulate."""
    peak_bytes_per_second: float
    """Bytes read plus bytes written by a copy."""


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several runs, with device synchronisation."""
    work()
    synchronize(device)
    best, runs, begun = math.inf, 0, time.perf_counter()
    while runs < MIN_REPEATS or time.perf_counter() - begun < SECONDS:
        start = time.perf_counter()
        work()
        synchronize(device)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of the fastest square matrix product of this dtype."""
    best = 0.0
    for size in SIZES:
        left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        product = partial(torch.mm, left, right, out=torch.empty_like(left))
        seconds = fastest(product, device)
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_SECONDS:
            break
    return best


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read plus written, of a copy within the device's memory."""
    # initialised, because the pages of uninitialised memory are shared
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / fastest(partial(target.copy_, source), device)


def measure(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure both peak rates; takes about a second.

    With a narrower dtype than float32, autocast keeps some products in float32, which may be faster on a CPU.
    Therefore the bound is the better of both.
    """
    products = max(product_rate(device, each) for each in {dtype, torch.float32})
    return Peaks(peak_flops_per_second=products, peak_bytes_per_second=copy_rate(device))


class Roofline:
    """A machine's peak rates for one dtype and this process's threads, stored in an experiment's folder."""

    def __init__(self, folder: Path, device: torch.device, device_name: str | None, dtype: str) -> None:
        """Load the peaks that an earlier cell of the experiment measured, or measure them."""
        self.device, self.dtype = device, getattr(torch, dtype)
        self.folder = folder / "roofline"
        machine = [device.type, device_name, dtype, torch.get_num_threads(), torch.__version__]
        self.decides = [*machine, torch.get_float32_matmul_precision(), list(SIZES), COPY_BYTES]
        peaks = load_or_measure(
            self.folder, self.decides, lambda: asdict(self._measure()), {*Peaks.__annotations__}
        )
        self.peaks = Peaks(**peaks)

    def _measure(self) -> Peaks:
        return measure(self.device, self.dtype)

    def _remeasure(self) -> None:
        """Measure the peaks again and keep the better value of each."""
        with torch.random.fork_rng():
            again = asdict(self._measure())
        self.peaks = Peaks(**{key: max(value, again[key]) for key, value in asdict(self.peaks).items()})
        write_atomically(path_of(self.folder, self.decides), json.dumps(asdict(self.peaks)))

    def utilisation(self, flops: int, seconds: float) -> float:
        """Return algorithmic FLOPs ÷ seconds ÷ the peak rate, at most 1.

        Raises AboveRoofline if the ratio is above 1 even after the peak was measured again.
        """
        rate = flops / seconds
        for _ in range(MAX_REMEASUREMENTS):
            if rate <= self.peaks.peak_flops_per_second:
                break
            self._remeasure()
        share = rate / self.peaks.peak_flops_per_second
        if not share <= 1:
            raise AboveRoofline(
                f"roofline: {flops:.4g} FLOPs in {seconds:.4g} s are {share:.1%} of the peak of "
                f"{self.peaks.peak_flops_per_second:.4g} FLOPs per second that was measured on this machine"
            )
        return share
