"""What a machine can do at best: matrix products and copies a second, measured once a run.

Utilisation divides by it, so it has to be a bound: the best of several sizes and repeats, while a cell's
own time is a median. A machine whose speed varies may still be quicker as a cell runs than it was as its
roofline was taken. A cell above the roofline therefore has it taken again, there and then, and keeps the
better; only what stands above that too is refused, without a margin.
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

from bench.measure.cached import once, path_of
from bench.measure.timing import synchronize
from bench.records import write_atomically

SIZES = (512, 1024, 2048, 4096, 8192)
"""Rows of square matrices, tried in turn until one product takes `LONG_SECONDS`: small ones do not fill an
accelerator, and large ones take a CPU long to no purpose."""
LONG_SECONDS = 0.02
COPY_BYTES = 2**27
"""More than caches hold."""
AT_LEAST = 5
"""Repeats of each product and of the copy, whatever they take."""
SECONDS = 0.15
"""Wall clock of the repeats of each, at least."""
ATTEMPTS = 3
"""How often a cell above the roofline has it taken again."""


class AboveRoofline(Exception):
    """A cell did more than the machine can; the message has the figures."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The best that a machine was seen to do, under a record's keys."""

    peak_flops_per_second: float
    """2 per multiply-accumulate of matrix products."""
    peak_bytes_per_second: float
    """Bytes read plus bytes written of a copy."""


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, the device waited for."""
    work()
    synchronize(device)
    best, runs, begun = math.inf, 0, time.perf_counter()
    while runs < AT_LEAST or time.perf_counter() - begun < SECONDS:
        start = time.perf_counter()
        work()
        synchronize(device)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the best square matrix product of this type."""
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
    """Bytes a second, read plus written, of a copy within the device's memory."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)  # written, so that no page is shared
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / fastest(partial(target.copy_, source), device)


def measure(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Take both; about a second.

    In a narrower type than float32 autocast leaves some products in float32, which may be the quicker one
    on a CPU: the better of both is the bound.
    """
    products = max(product_rate(device, each) for each in {dtype, torch.float32})
    return Peaks(peak_flops_per_second=products, peak_bytes_per_second=copy_rate(device))


class Roofline:
    """A machine's peaks for one type of number at this process's threads, kept in an experiment's folder."""

    def __init__(self, folder: Path, device: torch.device, device_name: str | None, dtype: str) -> None:
        """Read what an earlier cell of the experiment found, or take it."""
        self.device, self.dtype = device, getattr(torch, dtype)
        self.folder = folder / "roofline"
        machine = [device.type, device_name, dtype, torch.get_num_threads(), torch.__version__]
        self.decides = [*machine, torch.get_float32_matmul_precision(), list(SIZES), COPY_BYTES]
        found = once(self.folder, self.decides, lambda: asdict(self._take()), {*Peaks.__annotations__})
        self.peaks = Peaks(**found)

    def _take(self) -> Peaks:
        return measure(self.device, self.dtype)

    def _raise(self) -> None:
        """Take the peaks again and keep the better of each."""
        with torch.random.fork_rng():
            again = asdict(self._take())
        self.peaks = Peaks(**{key: max(value, again[key]) for key, value in asdict(self.peaks).items()})
        write_atomically(path_of(self.folder, self.decides), json.dumps(asdict(self.peaks)))

    def utilisation(self, flops: int, seconds: float) -> float:
        """Algorithmic FLOPs ÷ seconds ÷ the peak rate, at most 1.

        Raises AboveRoofline where it is more and stays so when the peak is taken again.
        """
        rate = flops / seconds
        for _ in range(ATTEMPTS):
            if rate <= self.peaks.peak_flops_per_second:
                break
            self._raise()
        share = rate / self.peaks.peak_flops_per_second
        if not share <= 1:
            raise AboveRoofline(
                f"roofline: {flops:.4g} FLOPs in {seconds:.4g} s are {share:.1%} of the peak of "
                f"{self.peaks.peak_flops_per_second:.4g} FLOPs a second that this machine was seen to do"
            )
        return share
