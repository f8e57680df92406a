"""Training of a cell's model: its learning rate, its budgets, and the validation split during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.config.spec import CellSpec
from bench.evaluate.accuracy import measure_accuracy
from bench.evaluate.nll import tally
from bench.measure import predict
from bench.measure.cached import load_or_measure
from bench.model.compile import compiling
from bench.model.language_model import LanguageModel
from bench.records import Report
from bench.tasks.base import Batch, Task
from bench.tasks.text import Text
from bench.train.checkpoints import CheckpointStore
from bench.train.loop import Diverged, Training, train
from bench.train.rate_search import RateSearch, search
from bench.train.schedule import Budget

RATES_DIR = "rates"
"""Folder of an experiment that caches the results of searches for a learning rate."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Trains the model of one cell. `run` reports what becomes known on the way."""

    spec: CellSpec
    task: Task
    device: torch.device
    folder: Path
    """The experiment's folder."""
    checkpoints: CheckpointStore
    """Training resumes from the checkpoint of an earlier run of this cell."""
    report: Report

    def run(self, model: LanguageModel) -> Training:
        """Train the model with the budgets of the cell. Raises Diverged."""
        learning_rate = self._learning_rate(model)
        measure, budget = self.spec.measure, self._budget(model)
        validation_task = self._with_split("validation") if measure.validations else self.task
        eager = model.run_blocks, model.run_segment

        def score(task: Task) -> float:
            with model.running(*eager):  # other shapes than those that training has compiled
                return nll_of(self.spec, task, model, self.device)

        training = self._train(
            self.spec,
            self.task,
            model,
            budget,
            learning_rate,
            checkpoints=self.checkpoints,
            evaluate=lambda: score(self.task),
            validate=lambda: score(validation_task),
            validations=measure.validations,
        )
        self.report({"tokens_trained": training.tokens, "train_seconds": training.seconds})
        if isinstance(self.task, Text):
            self.report({"epochs": training.tokens / len(self.task.train_tokens)})
        if measure.validations:
            tokens, nlls = zip(*training.validations, strict=True)
            self.report({"validation_tokens": list(tokens), "validation_nll": list(nlls)})
        return training

    def budget_figures(self, training: Training, nll: float) -> dict[str, Any]:
        """Return the loss with each budget, if there are several; `nll` is that with the largest."""
        if self.spec.measure.train_budgets == 1:
            return {}
        step_tokens = training.step_tokens
        nlls = [*training.results, nll]
        figures = {
            "train_budgets": [steps * step_tokens for steps in training.budget.all_steps],
            "nll_by_budget": nlls,
        }
        known = self.task.bytes_per_target() if isinstance(self.task, Text) and self.spec.causal else None
        if known is not None:
            figures["bits_per_byte_by_budget"] = [each / known / math.log(2) for each in nlls]
        return figures

    def _budget(self, model: LanguageModel) -> Budget:
        return Budget.of(
            self.spec.measure,
            step_tokens=self.spec.batch_size * self.spec.seq_len,
            step_flops=model.cost(self.spec.workload()).step,
        )

    def _with_split(self, split: str, spec: CellSpec | None = None) -> Task:
        """Return the task of the cell, or of another, with this split as its test."""
        task, config, setting = (spec or self.spec).task()
        return task(config, replace(setting, test_split=split))

    def _learning_rate(self, model: LanguageModel) -> float:
        """Return the learning rate of the cell; if it is searched, report the search."""
        rate = self.spec.measure.learning_rate
        if rate != "search":
            return rate
        found = self._search(model)
        tried = list(found.nlls)
        self.report(
            {
                "learning_rate": found.best,
                "learning_rates_tried": tried,
                "learning_rate_nlls": [found.nlls[each] for each in tried],
            }
        )
        return found.best

    def _search(self, model: LanguageModel) -> RateSearch:
        """Search the rate with models of replicate 0. Each rate's result is cached for the whole experiment,
        so that replicates share it, and a cell that is killed does not try a rate again."""
        spec = replace(self.spec, replicate=0, twin=0)
        task = self._with_split("validation", spec)
        budget = self._budget(model)
        if self.spec.measure.search_budget == "smallest":
            budget = budget.smallest

        def score(rate: float) -> dict[str, Any]:
            candidate = predict.build_model(spec).to(self.device)
            try:
                self._train(spec, task, candidate, budget, rate)
                return {"nll": nll_of(spec, task, candidate, self.device)}
            except Diverged:
                return {"nll": None}

        def cached(rate: float) -> float:
            decides = [self._decides(spec, task), budget.steps, budget.seconds, rate]
            figure = load_or_measure(self.folder / RATES_DIR, decides, lambda: score(rate), {"nll"})["nll"]
            return math.inf if figure is None or not math.isfinite(figure) else float(figure)

        return search(self.spec.measure.search_rates, cached)

    def _decides(self, spec: CellSpec, task: Task) -> str:
        """Return the hash of everything on which a search depends."""
        data_sha256 = task.sha256(task.config, task.setting.data)
        return spec.cell_id(data_sha256, self.checkpoints.code_sha256)

    def _train(
        self,
        spec: CellSpec,
        task: Task,
        model: LanguageModel,
        budget: Budget,
        learning_rate: float,
        *,
        checkpoints: CheckpointStore | None = None,
        evaluate: Callable[[], float] | None = None,
        validate: Callable[[], float] | None = None,
        validations: int = 0,
    ) -> Training:
        def batches(step: int, done: float) -> Batch:
            return task.train_batch(step, done).for_training(self.device)

        # Only training is compiled: evaluation has other shapes, each of which would be compiled again.
        with compiling(model, spec.compile):
            return train(
                model,
                batches,
                budget=budget,
                learning_rate=learning_rate,
                causal=spec.causal,
                step_tokens=spec.batch_size * spec.seq_len,
                carry_state=spec.measure.carry_state,
                checkpoints=checkpoints,
                evaluate=evaluate,
                validate=validate,
                validations=validations,
            )


def nll_of(spec: CellSpec, task: Task, model: LanguageModel, device: torch.device) -> float:
    """Return the mean nll of the task's test, computed as the cell's `nll` is. The model is not changed."""
    if not isinstance(task, Text):
        edges = task.distance_edges
        batches = task.test_batches()
        return measure_accuracy(model, batches, causal=spec.causal, distance_edges=edges, device=device).nll
    variant, config, _ = spec.attention()
    if variant.info_for(config).caps.stateful:
        return tally(model, task.test_documents(), causal=spec.causal, device=device).nll
    stride = (spec.causal and spec.measure.eval_stride) or spec.seq_len
    return tally(model, task.test_batches(stride), causal=spec.causal, device=device).nll
