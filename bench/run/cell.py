"""Measures one cell in its own process: checks, gates, then the cell's scenarios. Each figure is reported as
soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from bench.config.spec import Cell
from bench.measure import compile_gate, gates
from bench.measure.device_settings import device_settings
from bench.measure.gate_failed import largest
from bench.measure.predict import CPU
from bench.model.activations import STRATEGIES
from bench.records import Report
from bench.run import provenance
from bench.run.memory_limit import UNLIMITED
from bench.scenarios.cost import CostMeasurement
from bench.scenarios.plan import Plan
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
                spec = plan.fit(spec.measure.budget)
            if not spec.measure.execute:
                plan.run()
                return
        make_task, task_config, setting = spec.task()
        task = make_task(task_config, setting)
        if reason := task.unsupported():
            raise Unsupported(reason)
        with self._work():
            if not missing_kernel(spec, CPU):  # without it there is no prediction
                plan.check_memory(self.memory, cell_id=self.cell_id, audit_share=self.cell.audit_oom)
            figures = asdict(gates.check(spec, self.cell.folder, self.code_sha256))
            if spec.is_compiled:
                compiled = compile_gate.check(spec, self.cell.folder, self.code_sha256)
                if figures["reference_max_abs"] is not None:
                    figures["reference_max_abs"] = largest([figures["reference_max_abs"], compiled])
            self.report(figures)
            CostMeasurement(
                spec,
                task,
                self.device,
                folder=self.cell.folder,
                cell_id=self.cell_id,
                device_name=device_name,
                report=self.report,
            ).run()
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
