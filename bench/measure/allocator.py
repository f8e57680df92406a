"""Peak memory of a step by the allocator, for steps whose operations a dispatch mode does not see.

Compiled code allocates and frees its buffers by itself, so `LiveStorage` cannot count them. The allocator
can: on an accelerator it has counters, on a CPU the profiler reports every allocation. In contrast to live
storage, this includes what a kernel allocates for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.measure.memory import reset_rss_peak, resident_bytes
from bench.measure.step import DevicePeaks, Subject
from bench.train.step import Phase

_MARK = "longctx_bench: end of "
"""Beginning of the name of the event that ends a phase."""


@dataclass(frozen=True, kw_only=True)
class AllocatedBytes:
    """Of one training step, in bytes."""

    source: str
    peaks: dict[Phase, int]
    """The maximum that was allocated in each phase."""
    stored: int
    """What the forward pass leaves for the backward pass; of the segment that leaves most."""
    rss_peak: int | None = None
    reserved: int | None = None
    library: int | None = None
    """See `StepFigures.library_bytes`."""

    @property
    def peak_phase(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.peaks, key=self.peaks.__getitem__)


def on_host(subject: Subject, held: int) -> AllocatedBytes:
    """Return the peaks of a step on the CPU, from the allocations that torch's profiler reports.

    `held`: bytes that are allocated before the step, gradients excluded.
    """
    known = reset_rss_peak()
    subject.step()
    rss = resident_bytes("VmHWM") if known else None
    subject.optimizer.zero_grad(set_to_none=True)

    def mark(phase: Phase) -> None:
        with record_function(f"{_MARK}{phase}:{subject.bytes()['grad_bytes']}"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        subject.step(on_phase_end=mark)
    events: list[tuple[int, int | PhaseEnd]] = []
    results = profiler.profiler
    assert results is not None
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            events.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith(_MARK):
            phase, _, gradients = event.name().removeprefix(_MARK).partition(":")
            events.append((event.start_ns(), PhaseEnd(cast(Phase, phase), int(gradients))))
    peaks, stored = peaks_of((change for _, change in sorted(events, key=lambda event: event[0])), held)
    return AllocatedBytes(source="cpu_allocator", peaks=peaks, stored=stored, rss_peak=rss)


class PhaseEnd(NamedTuple):
    """The end of a phase, and the bytes of the gradients that exist then."""

    phase: Phase
    gradients: int


def peaks_of(changes: Iterable[int | PhaseEnd], held: int) -> tuple[dict[Phase, int], int]:
    """Return the maximum sum of each phase, and the maximum that a forward pass leaves.

    `changes` are allocated (positive) and freed (negative) bytes, and the ends of phases, in order; `held` is
    the sum at the beginning. A step with several segments repeats the phases.
    """
    peaks: dict[Phase, int] = {"forward": 0, "backward": 0, "optimizer": 0}
    live = peak = held
    stored = 0
    for change in changes:
        if isinstance(change, int):
            live += change
            peak = max(peak, live)
            continue
        peaks[change.phase] = max(peaks[change.phase], peak)
        if change.phase == "forward":
            stored = max(stored, live - held - change.gradients)
        peak = live
    return peaks, stored


def on_device(subject: Subject, device: torch.device) -> AllocatedBytes:
    """Return the peaks of a step by the counters of the device's caching allocator."""
    peaks = DevicePeaks(subject, device)
    peaks.begin()
    live = sum(size for name, size in subject.bytes().items() if name != "grad_bytes")
    subject.step(on_phase_end=peaks.after)
    return AllocatedBytes(
        source=f"{device.type}_allocated",
        peaks=peaks.peaks,
        stored=peaks.stored,
        reserved=peaks.reserved,
        library=peaks.before - live,
    )
