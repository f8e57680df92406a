"""One cell inside its own process: check, gate, measure. Figures are told as they are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from bench.config.spec import Cell
from bench.evaluate.quality import QualityEvaluation
from bench.evaluate.receptive_field import connected_share, reach
from bench.measure import contention, estimate, gates, nvml, predict, timing
from bench.measure import step as step_measure
from bench.measure.predict import CPU
from bench.measure.roofline import Roofline
from bench.model.activations import STRATEGIES
from bench.model.language_model import LanguageModel
from bench.model.reversible import reversible
from bench.records import Report
from bench.run import provenance
from bench.run.memory_limit import UNLIMITED
from bench.tasks.base import Task
from bench.train.checkpoints import CheckpointStore

LONGEST_CONNECTED = 1024
"""Tokens up to which a plan also works out what a model connects: a second would pass in longer ones."""


class Unsupported(Exception):
    """The cell cannot run; the message is the row's reason."""


class DoesNotFit(Exception):
    """The cell is predicted to need more memory than it may take; the message says how much."""


def drawn(cell_id: str, share: float) -> bool:
    """Whether a cell is among a share of all, at random but always the same ones."""
    return int(cell_id, 16) < share * (1 << 4 * len(cell_id))


class CellRun:
    """The steps of one cell. `run` does them in order."""

    def __init__(
        self, cell: Cell, cell_id: str, code_sha256: str, report: Report, memory: int = UNLIMITED
    ) -> None:
        """`memory`: bytes that a step may take on the cell's device."""
        self.cell, self.cell_id, self.code_sha256 = cell, cell_id, code_sha256
        self.spec, self.report = cell.spec, report
        self.memory = memory
        self.seconds_work = 0.0
        self.variant, self.config, self.dims = self.spec.attention()
        self.device = torch.device(self.spec.device)
        self.prediction = predict.Prediction(self.spec)

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Time spent inside is what was asked for; the rest of the cell is overhead."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_work += time.perf_counter() - begun
            self.report({"seconds_work": self.seconds_work})

    def run(self) -> None:
        """Take every figure that was asked for.

        Raises Unsupported, DoesNotFit, gates.GateFailed, roofline.AboveRoofline, train.Diverged, or
        whatever running out of memory raises.
        """
        self.report({"threads": torch.get_num_threads(), "device_name": self._device_name()} | self._claims())
        measure = self.spec.measure
        self._refuse()
        with self._work():
            if measure.budget is not None:
                self._fit(measure.budget)
            if not measure.execute:
                self._predict()
                return
        make_task, task_config, setting = self.spec.task()
        task = make_task(task_config, setting)
        if reason := task.unsupported():
            raise Unsupported(reason)
        with self._work():
            self._afford()
            self._gates()
            subject = self._step(task)
            roofline = self._roofline()
            self._utilisation(subject, roofline, seconds=self._time(subject))
            del subject
            if measure.train_amount:
                QualityEvaluation(
                    self.spec, task, self.device, checkpoints=self._checkpoints(), report=self.report
                ).run()

    def _device_name(self) -> str | None:
        if self.device.type == "cpu" or not torch.accelerator.is_available():
            return provenance.cpu_model()
        return str(torch.get_device_module(self.device).get_device_name(self.device))

    def _claims(self) -> dict[str, Any]:
        """How cost is said to grow, so that a report can hold measurements against it."""
        claim = self.variant.info_for(self.config).complexity
        return {
            "claimed_time_exponent": claim.time,
            "claimed_memory_exponent": claim.memory,
            "claim_source": f"{claim.formula} ({claim.source})",
            "survey_exponent": claim.survey,
            "claimed_depth_exponent": STRATEGIES[self.spec.activations].depth_exponent,
        }

    def _refuse(self) -> None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        absent = accelerator is None or accelerator.type != self.device.type
        if self.device.type != "cpu" and absent and self.spec.measure.execute:
            raise Unsupported(f"device={self.spec.device}: this machine, or this torch, has none")
        if reason := self.variant.unsupported(self.config, self.dims, causal=self.spec.causal):
            raise Unsupported(reason)
        for layer in self.spec.model_spec().layers:
            slot = layer.feed_forward
            if reason := slot.layer.unsupported(slot.config, self.dims.d_model):
                raise Unsupported(f"{slot.name}: {reason}")
        if reason := STRATEGIES[self.spec.activations].unsupported(self.device.type):
            raise Unsupported(f"activations={self.spec.activations}: {reason}")
        measure = self.spec.measure
        plans = not measure.execute or measure.budget is not None
        if plans and (reason := self._missing(CPU)):
            raise Unsupported(f"a plan runs on fake tensors of the CPU: {reason}")
        if reason := self._missing(self.device):
            raise Unsupported(reason)

    def _missing(self, device: torch.device) -> str | None:
        """What the variant lacks on a device, for the cell's dtype or for the gates', which is float32."""
        reasons = (
            self.variant.missing(self.config, self.dims, device=device, dtype=dtype)
            for dtype in (getattr(torch, self.spec.dtype), torch.float32)
        )
        return next((reason for reason in reasons if reason), None)

    def _gates(self) -> None:
        figures = gates.check(self.spec, self.cell.folder, self.code_sha256)
        self.report(asdict(figures))

    def _fit(self, budget: int) -> None:
        """Find what fits; where the batch is to be what fits, it is that from here on."""
        self.report({"budget_bytes": budget})
        batch_size = self.prediction.largest_batch_size(budget)
        self.report({"largest_batch_size": batch_size})
        if self.spec.batch_size:
            self.report({"longest_seq_len": self.prediction.longest_seq_len(budget)})
        elif batch_size:
            self.spec = replace(self.spec, batch_size=batch_size)
            self.report({"batch_size": batch_size})
        else:
            least = self.prediction.predict(batch_size=1).peak_bytes
            raise DoesNotFit(f"one sequence is predicted to need {least:,} bytes of {budget:,}")

    def _afford(self) -> None:
        """Refuse a step whose predicted peak is more than the cell may take; a share of such cells goes on,
        so that it is known how often that is wrong."""
        if self._missing(CPU):
            return  # nothing to predict with
        peak = self.prediction.predict(batch_size=self.spec.batch_size).peak_bytes
        self.report({"peak_bytes_predicted": peak})
        if peak > self.memory:
            audited = drawn(self.cell_id, self.cell.audit_oom)
            self.report({"audited": audited})
            if not audited:
                raise DoesNotFit(
                    f"a step is predicted to take {peak:,} bytes, of {self.memory:,} that it may"
                )

    def _predict(self) -> None:
        figures = self.prediction.predict(batch_size=self.spec.batch_size)
        with torch.device("meta"):
            model = predict.build_model(self.spec)
        self._tell_flops(model, figures, source="predicted")
        self._tell_bytes(figures, source="predicted")
        self.report({"peak_bytes_predicted": figures.peak_bytes})
        if self.spec.measure.reach:
            self.report({"reach": reach(model, self.spec.seq_len, causal=self.spec.causal)})
        if (seq_len := self.spec.seq_len) <= LONGEST_CONNECTED:
            self.report({"connected_share": connected_share(model, seq_len, causal=self.spec.causal)})

    def _step(self, task: Task) -> step_measure.Subject:
        def make() -> step_measure.Subject:
            return predict.subject(self.spec, lambda: task.train_batch(0, 0.0), self.device)

        if self.device.type == "cpu":
            subject, figures = step_measure.on_host(make)
            source = "live_storage"
        else:
            subject, figures = step_measure.on_device(make, self.device)
            source = f"{self.device.type}_allocated"
        self._tell_flops(subject.model, figures, source="dispatched")
        self._tell_bytes(figures, source=source)
        if self.spec.activations == "reversible":
            drift: dict[int, float] = {}
            with subject.model.running(partial(reversible, drift=drift)):
                subject.step()
            self.report({"rebuild_error_by_level": [drift[level] for level in sorted(drift)]})
        return subject

    def _tell_flops(self, model: LanguageModel, figures: step_measure.StepFigures, source: str) -> None:
        work = self.spec.workload()
        forward = model.cost(work)
        reason, bounded = model.flop_overhead_reason, model.overhead_is_bounded
        ratio = gates.cost_ratio(figures.flops_forward, forward, reason, bounded=bounded)
        unequal = abs(ratio - 1) > gates.COST_TOLERANCE
        if card := self.spec.measure.card:
            seconds = estimate.estimated_seconds(
                figures.launches_step, figures.bytes_moved_step, figures.flops_step, estimate.CARDS[card]
            )
            self.report({"step_seconds_estimated": seconds, "estimate_card": card})
        self.report(
            {
                "impl": model.impl,
                "params": sum(p.numel() for p in model.parameters()),
                "flops_algorithmic_step": 3 * forward.total,
                "flops_attention_step": 3 * forward.mixing,
                "flops_executed_step": figures.flops_step,
                "flops_source": source,
                "launches_step": figures.launches_step,
                "bytes_moved_step": figures.bytes_moved_step,
                "cost_ratio": ratio,
                "cost_ratio_reason": reason if unequal else None,
                "state_bytes": model.state_bytes(work),
            }
        )

    def _tell_bytes(self, figures: step_measure.StepFigures, source: str) -> None:
        self.report(
            {
                "peak_bytes": figures.peak_bytes,
                "peak_bytes_source": source,
                "peak_phase": figures.peak_phase,
                "forward_peak_bytes": figures.phase_peak_bytes("forward"),
                "backward_peak_bytes": figures.phase_peak_bytes("backward"),
                "optimizer_peak_bytes": figures.phase_peak_bytes("optimizer"),
                "peak_grad_bytes": figures.at_peak["gradients"],
                "peak_activation_bytes": figures.at_peak["activations"],
                "peak_workspace_bytes": figures.at_peak["workspace"],
                "param_bytes": figures.param_bytes,
                "grad_bytes": figures.grad_bytes,
                "optimizer_bytes": figures.optimizer_bytes,
                "activation_bytes": figures.activation_bytes,
                "rss_peak_bytes": figures.rss_peak_bytes,
                "cuda_reserved_bytes": figures.reserved_bytes,
                "library_bytes": figures.library_bytes,
            }
        )

    def _roofline(self) -> Roofline:
        """The machine's, which the first cell of a run takes; between a cell's memory and its time, so that
        what it allocates is in neither."""
        found = Roofline(self.cell.folder, self.device, self._device_name(), self.spec.dtype)
        self.report(asdict(found.peaks))
        return found

    def _utilisation(self, subject: step_measure.Subject, roofline: Roofline, *, seconds: float) -> None:
        """Of a step that takes so long. Tells the peaks again, which may have been raised."""
        flops = 3 * subject.model.cost(self.spec.workload()).total
        try:
            self.report({"mfu": roofline.utilisation(flops, seconds)})
        finally:
            self.report(asdict(roofline.peaks))

    def _time(self, subject: step_measure.Subject) -> float:
        """Times of a step and of a forward pass; returns the step's median."""
        measure, tokens = self.spec.measure, self.spec.batch_size * self.spec.seq_len

        def sample(work: Callable[[], object]) -> timing.Samples:
            return timing.sample(
                work,
                self.device,
                seconds=measure.time_seconds,
                at_least=measure.min_samples,
                precision=measure.precision,
            )

        window = contention.ContentionMonitor(self.device)
        steps = sample(subject.step)
        joules = window.joules()
        subject.optimizer.zero_grad(set_to_none=True)
        subject.model.eval()
        forwards = sample(subject.forward)
        seen = window.end()
        self.report(
            {
                "step_seconds_median": steps.median,
                "step_seconds_samples": steps.seconds,
                "forward_seconds_median": forwards.median,
                "forward_seconds_samples": forwards.seconds,
                "tokens_per_second": tokens / steps.median,
                "forward_tokens_per_second": tokens / forwards.median,
                nvml.ENERGY: None if joules is None else joules / (steps.runs * tokens),
                "sampling_end": steps.end,
                "sampling_half_width": steps.half_width,
                **seen,
            }
        )
        return steps.median

    def _checkpoints(self) -> CheckpointStore:
        """The checkpoints of the cell's training."""
        return CheckpointStore(
            folder=self.cell.folder,
            cell_id=self.cell_id,
            code_sha256=self.code_sha256,
            device_name=self._device_name(),
            every_seconds=self.spec.measure.checkpoint_seconds,
        )
