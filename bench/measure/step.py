"""One training step under the counters: its FLOPs, and its memory where it peaks.

The first step is counted. The second is measured, because Adam's state does not exist before the
first ends. The same code runs on real tensors and, for a prediction, on fake ones.

Over 300 lines: counting, measuring and predicting are one piece of code.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure.flops import CountFlops
from bench.measure.launches import Counts
from bench.measure.memoize import MemoizingStorage, described
from bench.measure.memory import LiveStorage, reset_rss_peak, resident_bytes, tensor_bytes
from bench.measure.timing import synchronize
from bench.model.language_model import LanguageModel, Output
from bench.tasks.base import Batch
from bench.train.step import Phase, optimizer_for, training_step


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Of one training step; bytes at the peak of the second."""

    flops_forward: int
    flops_step: int
    launches_step: int
    bytes_moved_step: int
    param_bytes: int
    grad_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """What the forward pass leaves for the backward pass; of the segment that leaves most."""
    peaks: dict[Phase, dict[str, int]]
    """The most that was live in each phase, split by what the bytes are for: memory.LABELS."""
    attention_kernels: tuple[str, ...] = ()
    """Those that the step dispatched; in a prediction, the CPU's."""
    rss_peak_bytes: int | None = None
    reserved_bytes: int | None = None
    held_bytes: int = 0
    """What is live before the step: parameters, buffers, the optimiser's state and the batch."""
    library_bytes: int | None = None
    """What the allocator holds between steps beyond live tensors: workspaces that libraries keep (cuBLAS has
    one a thread, 32 MiB each on Hopper), and blocks rounded up."""

    def phase_peak_bytes(self, phase: Phase) -> int:
        """The most that was live in a phase."""
        return sum(self.peaks[phase].values())

    @property
    def peak_phase(self) -> Phase:
        """When the most was live."""
        return max(self.peaks, key=self.phase_peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that was live at any time."""
        return self.phase_peak_bytes(self.peak_phase)

    @property
    def at_peak(self) -> dict[str, int]:
        """What those bytes were for."""
        return self.peaks[self.peak_phase]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in training, ready for one more step."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    batch: Batch
    causal: bool

    @classmethod
    def make(
        cls,
        build: Callable[[], LanguageModel],
        batch: Callable[[], Batch],
        *,
        causal: bool,
        device: torch.device,
    ) -> Subject:
        """Build the model and its optimiser on the device. The model makes all visits in every step."""
        with device:
            model = build().train()
        model.makes_all_visits = True
        optimizer = optimizer_for(model, 1e-4)
        return cls(model=model, optimizer=optimizer, batch=batch().for_training(device), causal=causal)

    def step(
        self, *, segments: Iterable[slice] | None = None, on_phase_end: Callable[[Phase], None] | None = None
    ) -> torch.Tensor:
        """One training step."""
        return training_step(
            self.model,
            self.optimizer,
            self.batch,
            causal=self.causal,
            segments=segments,
            on_phase_end=on_phase_end,
        ).nll

    @torch.no_grad()
    def forward(self) -> None:
        """One forward pass, nothing stored."""
        for _ in self.model.stream(self.batch.inputs, causal=self.causal):
            pass

    def segments(self) -> list[slice]:
        """The parts of the sequence that a step goes through."""
        return self.model.input_schedule.segments(self.batch.inputs.shape[1])

    def bytes(self) -> dict[str, int]:
        """Parameters, gradients and optimiser state."""
        parameters = list(self.model.parameters())
        return {
            "param_bytes": tensor_bytes(parameters),
            "grad_bytes": tensor_bytes([p.grad for p in parameters]),
            "optimizer_bytes": tensor_bytes([list(s.values()) for s in self.optimizer.state.values()]),
        }


class DistinctSegments:
    """The segments of a subject's sequence that a prediction goes through, and how many each stands for.

    Costs follow from shapes. A segment that begins with a state of the same shapes as an earlier one, and
    with as many live bytes, costs the same, and so do the segments after each: costs are periodic from
    there. Whole periods are left out; the last segment, which may be shorter, is always gone through.
    A period is one segment where every segment leaves a state of the same size, and longer where a
    memory takes several segments to return to a size.
    """

    def __init__(self, subject: Subject, storage: LiveStorage) -> None:
        self.subject, self.storage = subject, storage
        self.counts: list[int] = []
        """Number of segments that each one gone through stands for, itself included."""
        self._states: Any = None

    def __iter__(self) -> Iterator[slice]:
        hook = self.subject.model.register_forward_hook(self._note)
        segments = self.subject.segments()
        lengths = [segment.stop - segment.start for segment in segments]
        last = len(segments) - 1
        begun: dict[Any, int] = {}  # how a segment begins → its index
        index = 0
        while index < last:
            first = begun.setdefault(self._beginning(), index)
            period = index - first
            if period and lengths[first : last - period] == lengths[index:last]:
                times, rest = divmod(last - index, period)
                self.counts[first:] = [count + times for count in self.counts[first:]]
                yield from self._once(segments[last - rest : last])
                break
            yield from self._once([segments[index]])
            index += 1
        yield from self._once([segments[last]])
        hook.remove()

    def _once(self, segments: list[slice]) -> Iterator[slice]:
        for segment in segments:
            self.counts.append(1)
            yield segment

    def _note(self, model: LanguageModel, arguments: Any, output: Output) -> None:
        self._states = described(output.states, [])

    def _beginning(self) -> Any:
        return self._states, tuple(self.storage.labelled.values())


class _Phases:
    """Counts and split peaks of the phases of a step."""

    def __init__(self, storage: LiveStorage, counter: CountFlops) -> None:
        self.storage, self.counter = storage, counter
        self.counted, self.seen = counter.counts, storage.seen
        self.counts: dict[Phase, list[Counts]] = {"forward": [], "backward": [], "optimizer": []}
        """Of each segment in turn."""
        self.stored = 0
        self.peaks: dict[Phase, dict[str, int]] = {"forward": {}, "backward": {}, "optimizer": {}}
        """Of the segment where it was highest."""
        storage.reset_peak()

    def after(self, phase: Phase) -> None:
        storage = self.storage
        if phase == "forward":
            storage.label_since(self.seen, "activations")
            self.stored = max(self.stored, storage.labelled["activations"])
        if storage.peak > sum(self.peaks[phase].values()):
            self.peaks[phase] = storage.at_peak
        self.counts[phase].append(self.counter.counts.minus(self.counted))
        self.counted, self.seen = self.counter.counts, storage.seen
        storage.reset_peak()


def _measured(
    subject: Subject,
    storage: LiveStorage,
    *,
    distinct: DistinctSegments | None = None,
    on_phase_end: Callable[[Phase], None] = lambda _: None,
) -> StepFigures:
    """What a step takes, found from all its segments or from `distinct` ones."""
    subject.optimizer.zero_grad(set_to_none=True)
    gc.collect()  # what the step before left in cycles
    storage.label(list(subject.model.parameters()), "parameters")
    storage.label([list(state.values()) for state in subject.optimizer.state.values()], "optimizer")
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: storage.label(p.grad, "gradients"))
        for parameter in subject.model.parameters()
        if parameter.requires_grad
    ]
    held = storage.live
    with CountFlops() as counter:
        phases = _Phases(storage, counter)

        def both(phase: Phase) -> None:
            phases.after(phase)
            on_phase_end(phase)

        subject.step(segments=distinct, on_phase_end=both)
    for hook in hooks:
        hook.remove()
    if distinct:
        for phase in ("forward", "backward"):
            phases.counts[phase] = list(map(Counts.times, phases.counts[phase], distinct.counts))
    counts = {phase: reduce(Counts.plus, each) for phase, each in phases.counts.items()}
    step = reduce(Counts.plus, counts.values())
    return StepFigures(
        flops_forward=counts["forward"].flops,
        flops_step=step.flops,
        launches_step=step.launches,
        bytes_moved_step=step.bytes_moved,
        peaks=phases.peaks,
        activation_bytes=phases.stored,
        attention_kernels=counter.attention_kernels,
        held_bytes=held,
        **subject.bytes(),
    )


def on_host(make: Callable[[], Subject]) -> tuple[Subject, StepFigures]:
    """Figures by live storage; the subject is left ready for timing."""
    with LiveStorage() as storage:
        subject = make()
        subject.step()
        rss_known = reset_rss_peak()
        figures = _measured(subject, storage)
    return subject, replace(figures, rss_peak_bytes=resident_bytes("VmHWM") if rss_known else None)


def predicted(make: Callable[[], Subject]) -> StepFigures:
    """Figures of a step that is never run: shapes without storage, on the CPU's code paths.

    Of many segments, only those that differ are gone through: see `DistinctSegments`. Where parameters get no
    gradient, because nothing uses them or the sequence is too short for the auxiliary loss that does, the
    step is gone through again: an optimiser keeps no state for them.
    """
    with FakeTensorMode(), MemoizingStorage() as storage:
        subject = make()
        trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        subject.optimizer.step()  # makes the optimiser's state, as a first step would
        figures = _measured(subject, storage, distinct=DistinctSegments(subject, storage))
        idle = [parameter for parameter in trained if parameter.grad is None]
        if idle:
            for parameter in idle:
                subject.optimizer.state.pop(parameter, None)
            figures = _measured(subject, storage, distinct=DistinctSegments(subject, storage))
        return figures


class DevicePeaks:
    """The peaks of the phases of a step, by the counters of the device's caching allocator."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self.subject, self.device = subject, device
        self.module = torch.get_device_module(device)
        self.peaks: dict[Phase, int] = {"forward": 0, "backward": 0, "optimizer": 0}
        self.stored = self.reserved = self.before = 0

    def begin(self) -> None:
        """Free the gradients and the unused blocks, and reset the counters."""
        self.subject.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        self.module.empty_cache()
        self.module.reset_peak_memory_stats(self.device)
        self.before = self.module.memory_allocated(self.device)

    def after(self, phase: Phase) -> None:
        """Read the counters at the end of a phase."""
        synchronize(self.device)
        if phase == "forward":
            live = self.module.memory_allocated(self.device) - self.before
            self.stored = max(self.stored, live - self.subject.bytes()["grad_bytes"])
        self.peaks[phase] = max(self.peaks[phase], self.module.max_memory_allocated(self.device))
        self.reserved = max(self.reserved, self.module.max_memory_reserved(self.device))
        self.module.reset_peak_memory_stats(self.device)


def on_device(make: Callable[[], Subject], device: torch.device) -> tuple[Subject, StepFigures]:
    """Figures by the device's caching allocator; its peak is split by live storage, and what it holds
    beyond that, blocks rounded up and libraries' own, is workspace too."""
    with LiveStorage() as storage:
        subject = make()
        subject.step()  # libraries allocate their workspaces on first use
        device_peaks = DevicePeaks(subject, device)
        device_peaks.begin()
        library = device_peaks.before - storage.live
        figures = _measured(subject, storage, on_phase_end=device_peaks.after)
    beyond = {phase: peak - figures.phase_peak_bytes(phase) for phase, peak in device_peaks.peaks.items()}
    return subject, replace(
        figures,
        peaks={
            phase: split | {"workspace": split["workspace"] + beyond[phase]}
            for phase, split in figures.peaks.items()
        },
        activation_bytes=device_peaks.stored,
        reserved_bytes=device_peaks.reserved,
        library_bytes=library,
    )
