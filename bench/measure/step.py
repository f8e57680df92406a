"""One training step under the counters: its FLOPs, and its memory where it peaks.

The first step is counted. The second is measured, because Adam's state does not exist before the
first ends. The same code runs on real tensors and, for a prediction, on fake ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage, reset_rss_peak, resident_bytes, tensor_bytes
from bench.measure.timing import synchronize
from bench.model import LanguageModel
from bench.tasks.text import Batch
from bench.train import optimizer_for, training_step


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Of one training step; bytes at the peak of the second."""

    flops_forward: int
    flops_step: int
    peak_bytes: int
    param_bytes: int
    grad_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """What the forward pass leaves for the backward pass; of the segment that leaves most."""
    rss_peak_bytes: int | None
    reserved_bytes: int | None


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
        """Build the model and its optimiser on the device."""
        with device:
            model = build().train()
        given = Batch(*(tensor.to(device) for tensor in batch()))
        return cls(model=model, optimizer=optimizer_for(model, 1e-4), batch=given, causal=causal)

    def step(self, after_forward: Callable[[], None] | None = None) -> torch.Tensor:
        """One training step."""
        return training_step(
            self.model,
            self.optimizer,
            self.batch,
            causal=self.causal,
            after_forward=after_forward,
        )

    @torch.no_grad()
    def forward(self) -> None:
        """One forward pass, nothing stored."""
        for _ in self.model.stream(self.batch.inputs, causal=self.causal):
            pass

    def bytes(self) -> dict[str, int]:
        """Parameters, gradients and optimiser state."""
        parameters = list(self.model.parameters())
        return {
            "param_bytes": tensor_bytes(parameters),
            "grad_bytes": tensor_bytes([p.grad for p in parameters]),
            "optimizer_bytes": tensor_bytes([list(s.values()) for s in self.optimizer.state.values()]),
        }


def _count(subject: Subject) -> tuple[int, int]:
    """(forward, whole step) FLOPs dispatched."""
    with CountFlops() as forward:
        subject.forward()
    with CountFlops() as step:
        subject.step()
    return forward.total, step.total


def on_host(make: Callable[[], Subject]) -> tuple[Subject, StepFigures]:
    """Figures by live storage, for the CPU and for fake tensors; the subject is left ready for timing."""
    stored = 0
    with LiveStorage() as storage:
        subject = make()
        forward, whole = _count(subject)
        subject.optimizer.zero_grad(set_to_none=True)
        before = storage.live
        storage.reset_peak()
        rss_known = reset_rss_peak()

        def note() -> None:
            nonlocal stored
            stored = max(stored, storage.live - before - subject.bytes()["grad_bytes"])

        subject.step(after_forward=note)
    return subject, StepFigures(
        flops_forward=forward,
        flops_step=whole,
        peak_bytes=storage.peak,
        activation_bytes=stored,
        rss_peak_bytes=resident_bytes("VmHWM") if rss_known else None,
        reserved_bytes=None,
        **subject.bytes(),
    )


def on_device(make: Callable[[], Subject], device: torch.device) -> tuple[Subject, StepFigures]:
    """Figures by the device's caching allocator."""
    module = torch.get_device_module(device)
    subject = make()
    forward, whole = _count(subject)
    subject.step()  # libraries allocate their workspaces on first use
    synchronize(device)
    subject.optimizer.zero_grad(set_to_none=True)
    module.empty_cache()
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    stored = 0

    def note() -> None:
        nonlocal stored
        synchronize(device)
        live = module.memory_allocated(device) - before
        stored = max(stored, live - subject.bytes()["grad_bytes"])

    subject.step(after_forward=note)
    synchronize(device)
    return subject, StepFigures(
        flops_forward=forward,
        flops_step=whole,
        peak_bytes=module.max_memory_allocated(device),
        activation_bytes=stored,
        rss_peak_bytes=None,
        reserved_bytes=module.max_memory_reserved(device),
        **subject.bytes(),
    )


def predicted(make: Callable[[], Subject]) -> StepFigures:
    """Figures of a step that is never run: shapes without storage, on the CPU's code paths."""
    with FakeTensorMode():
        _, figures = on_host(make)
    return figures
