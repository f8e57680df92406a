"""Measured cost of a training step: FLOPs, memory, time and utilisation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from bench.config.spec import CellSpec
from bench.measure import allocator, contention, device_time, nvml, predict, step_profile, timing
from bench.measure import step as step_measure
from bench.measure.compile_time import CompiledStep
from bench.measure.roofline import Roofline
from bench.model.compile import by_block, compiling
from bench.model.reversible import reversible
from bench.model.visits import Run
from bench.records import Report
from bench.scenarios.figures import compiled_memory_figures, flop_figures, memory_figures
from bench.tasks.base import Task


class CostMeasurement:
    """The measurements of one cell's training step. `run` performs them in order."""

    def __init__(
        self,
        spec: CellSpec,
        task: Task,
        device: torch.device,
        *,
        folder: Path,
        cell_id: str,
        device_name: str | None,
        report: Report,
    ) -> None:
        """`folder`: the experiment's folder, which caches the roofline of the device `device_name`."""
        self.cell_id = cell_id
        self.spec, self.task, self.device, self.report = spec, task, device, report
        self.folder, self.device_name = folder, device_name
        self.compiled: CompiledStep | None = None

    def run(self) -> None:
        """Measure FLOPs, memory and time; the model is freed at the end.

        Raises gates.GateFailed, roofline.AboveRoofline, and torch.OutOfMemoryError or RuntimeError when
        memory runs out.
        """
        subject, figures = self._step()
        with compiling(subject.model, self.spec.compile):
            if self.spec.is_compiled:
                self._compile(subject, figures)
            if self.spec.activations == "reversible":
                self._drift(subject)
            roofline = self._roofline()
            self._utilisation(subject, roofline, seconds=self._time(subject))
            if self.spec.measure.profile:
                subject.model.train()
                step_profile.write(subject.step, self.device, self.folder, self.cell_id)

    def _step(self) -> tuple[step_measure.Subject, step_measure.StepFigures]:
        """Count FLOPs and launches, and measure memory, of a step without compilation: compiled code does not
        dispatch the operations that are counted. Memory is only reported if the cell is not compiled."""

        def make() -> step_measure.Subject:
            return predict.subject(self.spec, lambda: self.task.train_batch(0, 0.0), self.device)

        if self.device.type == "cpu":
            subject, figures = step_measure.on_host(make)
            source = "live_storage"
        else:
            subject, figures = step_measure.on_device(make, self.device)
            source = f"{self.device.type}_allocated"
        self.report(flop_figures(self.spec, subject.model, figures, source="dispatched"))
        if not self.spec.is_compiled:
            self.report(memory_figures(figures, source=source))
        self.report({"attention_kernels": ", ".join(figures.attention_kernels) or None})
        return subject, figures

    def _compile(self, subject: step_measure.Subject, figures: step_measure.StepFigures) -> None:
        """Compile the step and the forward pass, and measure the memory of the compiled step."""
        self.compiled = CompiledStep(subject, self.device)
        self._report_compiled(self.compiled)
        if self.device.type == "cpu":
            allocated = allocator.on_host(subject, figures.held_bytes)
        else:
            allocated = allocator.on_device(subject, self.device)
        self.report(compiled_memory_figures(figures, allocated))

    def _report_compiled(self, step: CompiledStep) -> None:
        self.report(
            {
                "compile_seconds": step.seconds,
                "graph_breaks": step.graph_breaks,
                "recompiles": step.recompiles,
            }
        )

    def _drift(self, subject: step_measure.Subject) -> None:
        """Measure the error of the streams that a reversible network rebuilds."""
        drift: dict[int, float] = {}
        run: Run = partial(reversible, drift=drift)
        with subject.model.running(by_block(run) if self.spec.compile == "block" else run):
            subject.step()
        self.report({"rebuild_error_by_level": [drift[level] for level in sorted(drift)]})

    def _roofline(self) -> Roofline:
        """Load the machine's peak rates; the first cell of an experiment measures them. This is done after
        the memory and before the time is measured, because the measurement allocates memory."""
        roofline = Roofline(self.folder, self.device, self.device_name, self.spec.dtype)
        self.report(asdict(roofline.peaks))
        return roofline

    def _utilisation(self, subject: step_measure.Subject, roofline: Roofline, *, seconds: float) -> None:
        """Report the utilisation of a step that takes `seconds`, and the peak rates again, because a cell
        above the roofline measures them again."""
        flops = subject.model.cost(self.spec.workload()).step
        try:
            self.report({"mfu": roofline.utilisation(flops, seconds)})
        finally:
            self.report(asdict(roofline.peaks))

    def _time(self, subject: step_measure.Subject) -> float:
        """Measure the times of a step and of a forward pass; returns the median of the step in seconds."""
        measure, tokens = self.spec.measure, self.spec.batch_size * self.spec.seq_len

        def sample(work: Callable[[], object]) -> timing.Samples:
            return timing.sample(
                work,
                self.device,
                seconds=measure.time_seconds,
                at_least=measure.min_samples,
                precision=measure.precision,
            )

        monitor = contention.ContentionMonitor(self.device)
        with self.compiled.counting() if self.compiled else nullcontext():
            steps = sample(subject.step)
        if self.compiled:
            self._report_compiled(self.compiled)
        joules = monitor.joules()
        busy = device_time.busy_seconds(subject.step, self.device)
        subject.optimizer.zero_grad(set_to_none=True)
        subject.model.eval()
        forwards = sample(subject.forward)
        load = monitor.end()
        self.report(
            {
                "step_seconds_median": steps.median,
                "step_seconds_samples": steps.seconds,
                "forward_seconds_median": forwards.median,
                "forward_seconds_samples": forwards.seconds,
                "tokens_per_second": tokens / steps.median,
                "forward_tokens_per_second": tokens / forwards.median,
                nvml.ENERGY: None if joules is None else joules / (steps.runs * tokens),
                "device_seconds_step": busy,
                "launch_seconds": device_time.launch_seconds(self.folder, self.device, self.device_name),
                "launch_bound": device_time.is_launch_bound(busy, steps.median),
                "sampling_end": steps.end,
                "warm_up_runs": steps.runs - len(steps.seconds),
                "step_precision": steps.precision,
                "forward_precision": forwards.precision,
                **load,
            }
        )
        return steps.median
