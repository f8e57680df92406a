"""Measures one cell in its own process: checks, gates, then the cell's scenarios. Each figure is reported as
soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.config.spec import Cell, CellSpec
from bench.measure import compile_gate, decoding, decoding_gate, gates
from bench.measure.device_settings import device_settings
from bench.measure.gate_failed import largest
from bench.measure.predict import CPU
from bench.measure.roofline import Roofline
from bench.model.activations import STRATEGIES
from bench.records import Report
from bench.run import provenance
from bench.run.memory_limit import UNLIMITED
from bench.scenarios.cost import CostMeasurement
from bench.scenarios.decoding import DecodingMeasurement, reason_not_to_decode, room
from bench.scenarios.plan import DoesNotFit, Plan
from bench.scenarios.quality import QualityEvaluation
from bench.scenarios.support import Unsupported, check_supported, missing_kernel
from bench.train.checkpoints import CheckpointStore


class CellRun:
    """The checks and the scenarios of one cell. `run` performs them in order."""

    def __init__(
        self, cell: Cell, cell_id: str, code_sha256: str, report: Report, memory: int = UNLIMITED
    ) -> None:
        """`memory`: the maximum bytes of a step on the cell's device."""
        self.cell, self.cell_id, self.code_sha256 = cell, cell_id, code_sha256
        self.report, self.memory = report, memory
        self.device = torch.device(cell.spec.device)
        self.seconds_work = 0.0

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Count the time inside as work; the rest of the cell's time is overhead."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_work += time.perf_counter() - begun
            self.report({"seconds_work": self.seconds_work})

    def run(self) -> None:
        """Report every requested figure.

        Raises Unsupported, DoesNotFit, gates.GateFailed, roofline.AboveRoofline, train.loop.Diverged, and
        torch.OutOfMemoryError or RuntimeError when memory runs out.
        """
        spec = self.cell.spec
        device_name = self._device_name()
        threads = torch.get_num_threads()
        self.report({"threads": threads, "device_name": device_name} | self._claimed_growth())
        check_supported(spec)
        if spec.measure.execute:
            self.report(device_settings(self.device))
        plan = Plan(spec, self.report)
        with self._work():
            if spec.measure.budget is not None:
                spec = plan.fit(spec.measure.budget) if spec.measure.step else self._fit_decoding(spec)
            if not spec.measure.execute:
                if spec.measure.step:
                    plan.run()
                if spec.measure.decode_tokens and self._can_decode(spec):
                    DecodingMeasurement(spec, self.device, limit=self.memory, report=self.report).predict()
                return
        make_task, task_config, setting = spec.task()
        task = make_task(task_config, setting)
        if reason := task.unsupported():
            raise Unsupported(reason)
        with self._work():
            if spec.measure.step and not missing_kernel(spec, CPU):  # without it there is no prediction
                plan.check_memory(self.memory, cell_id=self.cell_id, audit_share=self.cell.audit_oom)
            figures = asdict(gates.check(spec, self.cell.folder, self.code_sha256))
            if spec.is_compiled:
                compiled = compile_gate.check(spec, self.cell.folder, self.code_sha256)
                if figures["reference_max_abs"] is not None:
                    figures["reference_max_abs"] = largest([figures["reference_max_abs"], compiled])
            self.report(figures)
            if spec.measure.step:
                CostMeasurement(
                    spec,
                    task,
                    self.device,
                    folder=self.cell.folder,
                    cell_id=self.cell_id,
                    device_name=device_name,
                    report=self.report,
                ).run()
            if spec.measure.decode_tokens and self._can_decode(spec):
                self.report({"decode_max_abs": decoding_gate.check(spec, self.cell.folder, self.code_sha256)})
                self.report(asdict(Roofline(self.cell.folder, self.device, device_name, spec.dtype).peaks))
                DecodingMeasurement(spec, self.device, limit=self.memory, report=self.report).run()
            if spec.measure.train_amount and not self.cell.only_cost:
                checkpoints = self._checkpoints(device_name)
                QualityEvaluation(
                    spec,
                    task,
                    self.device,
                    folder=self.cell.folder,
                    checkpoints=checkpoints,
                    report=self.report,
                ).run()

    def _fit_decoding(self, spec: CellSpec) -> CellSpec:
        """With `batch_size=fit` and no training step: the largest batch that is decoded within the budget."""
        budget = spec.measure.budget
        assert budget is not None
        usable = int(budget * (1 - spec.measure.reserve))
        self.report({"budget_bytes": budget, "reserve": spec.measure.reserve})
        if spec.batch_size:
            return spec
        if reason := reason_not_to_decode(spec):
            raise Unsupported(reason)
        batch_size = decoding.largest_batch(spec, usable, room=room(spec))
        if not batch_size:
            raise DoesNotFit(
                f"one sequence does not fit into {usable:,} bytes, the budget without its reserve"
            )
        self.report({"batch_size": batch_size})
        return replace(spec, batch_size=batch_size)

    def _can_decode(self, spec: CellSpec) -> bool:
        """Whether the model can be decoded; if not, the reason is reported. Raises Unsupported if no step is
        measured either."""
        reason = reason_not_to_decode(spec)
        if reason and not spec.measure.step:
            raise Unsupported(reason)
        self.report({"decode_reason": reason})
        return reason is None

    def _device_name(self) -> str | None:
        if self.device.type == "cpu":
            return provenance.cpu_model()
        if not torch.accelerator.is_available():  # a plan of a device that this machine does not have
            return None
        return str(torch.get_device_module(self.device).get_device_name(self.device))

    def _claimed_growth(self) -> dict[str, Any]:
        """Return the growth of cost that the paper claims, with which the report compares measurements."""
        variant, config, _ = self.cell.spec.attention()
        claim = variant.info_for(config).complexity
        return {
            "claimed_time_exponent": claim.time,
            "claimed_memory_exponent": claim.memory,
            "claim_source": f"{claim.formula} ({claim.source})",
            "survey_exponent": claim.survey,
            "claimed_depth_exponent": STRATEGIES[self.cell.spec.activations].depth_exponent,
        }

    def _checkpoints(self, device_name: str | None) -> CheckpointStore:
        """Return the store of the checkpoints of the cell's training."""
        return CheckpointStore(
            folder=self.cell.folder,
            cell_id=self.cell_id,
            code_sha256=self.code_sha256,
            device_name=device_name,
            every_seconds=self.cell.spec.measure.checkpoint_seconds,
        )
