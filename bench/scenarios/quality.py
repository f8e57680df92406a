"""Quality of a cell's model: train it with the cell's budget, then evaluate it.
Figures are reported immediately."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch

from bench.config.spec import CellSpec
from bench.evaluate import attention_stats, baselines, context_use, longer, needed_visits, pruning
from bench.evaluate.accuracy import measure_accuracy
from bench.evaluate.expert_load import counting_loads
from bench.evaluate.nll import evaluate
from bench.evaluate.receptive_field import reach
from bench.measure import predict
from bench.records import Report
from bench.scenarios.training import TrainingRun, nll_of
from bench.tasks.base import Task
from bench.tasks.text import Text
from bench.tasks.windows import least_context
from bench.train import kept_model
from bench.train.checkpoints import CheckpointStore
from bench.train.loop import Diverged

DIGITS = 5
"""Significant digits of the losses by block, which vary between blocks by far more."""


class QualityEvaluation:
    """The steps from a new model to its quality figures. `run` performs them in order."""

    def __init__(
        self,
        spec: CellSpec,
        task: Task,
        device: torch.device,
        *,
        folder: Path,
        checkpoints: CheckpointStore,
        report: Report,
    ) -> None:
        """`checkpoints` stores the training's checkpoints;
        training resumes from the checkpoint of an earlier run of this cell.
        `folder`: the experiment's folder, which caches the baselines."""
        self.spec, self.task, self.device, self.checkpoints, self.report = (
            spec,
            task,
            device,
            checkpoints,
            report,
        )
        self.folder, self.measure, self.causal = folder, spec.measure, spec.causal
        variant, config, _ = spec.attention()
        self.stateful = variant.info_for(config).caps.stateful
        self.model = predict.build_model(spec).to(device)

    def run(self) -> None:
        """Train, then compute every requested figure. Raises Diverged."""
        text = self.task if isinstance(self.task, Text) else None
        if text and self.measure.attention_windows:
            self.report({"softmax_error_initial": self._attention_stats(text).softmax_error})
        run = TrainingRun(
            spec=self.spec,
            task=self.task,
            device=self.device,
            folder=self.folder,
            checkpoints=self.checkpoints,
            report=self.report,
        )
        training = run.run(self.model)
        if self.measure.keep_model:
            kept = self.checkpoints
            kept_model.save(kept.folder, kept.cell_id, self.spec, kept.code_sha256, self.model)
        nll = self._evaluate_text(text, training.step) if text else self._evaluate_answers()
        self.report(run.budget_figures(training, nll))
        if self.measure.prune_windows:
            self._prune(nll)
        self.report({"state_policy": "carried" if self.stateful else "none"})

    def _evaluate_text(self, task: Text, steps: int) -> float:
        stride = (self.causal and self.measure.eval_stride) or self.spec.seq_len
        bytes_per_target = task.bytes_per_target() if self.causal else None
        with needed_visits.counting(self.model) as needed, counting_loads(self.model) as loads:
            quality = evaluate(
                self.model,
                task.test_batches(stride),
                documents=task.test_documents() if self.stateful else None,
                objective=task.objective,
                words_per_byte=task.words_per_byte(),
                bytes_per_target=bytes_per_target,
                unigram_nats=task.unigram_nats(),
                device=self.device,
                place_period=self.measure.place_period,
                blocks=task.blocks(stride),
                groups=task.groups(stride),
            )
        self.report(needed.figures(self.spec))
        self.report(
            {
                "nll": quality.nll,
                "nll_reset": quality.nll_reset,
                "perplexity": quality.perplexity,
                "bits_per_byte": quality.bits_per_byte,
                "word_perplexity": quality.word_perplexity,
                "unigram_perplexity": quality.unigram_perplexity,
                "nll_by_position": quality.nll_by_position,
                "nll_by_place": quality.nll_by_place,
                "nll_by_answer": quality.nll_by_group,
                "place_period": self.measure.place_period or None,
                "nll_by_block": _short(quality.nll_by_block),
                "nll_reset_by_block": _short(quality.nll_reset_by_block),
                "block_targets": quality.block_targets,
                "block_documents": task.block_documents(),
                "tokens_evaluated": quality.tokens,
                "bytes_evaluated": round(quality.tokens * bytes_per_target) if bytes_per_target else None,
                "eval_stride": stride if self.causal else None,
                "eval_min_context": least_context(self.spec.seq_len, stride) if self.causal else None,
                **loads.figures(),
            }
        )
        if bytes_per_target:
            self.report(asdict(baselines.of_cell(task, self.folder, steps=steps, stride=stride)))
        if not math.isfinite(quality.nll):
            raise Diverged(f"the loss on held-out text is {quality.nll}", steps, steps)
        if self.causal and self.measure.history_targets:
            self._context_use(task)
        if self.measure.longer:
            self.report(longer.of_cell(self.spec, self.model, task, self.device))
        if self.measure.reach:
            self._reach()
        if self.measure.attention_windows:
            self.report(asdict(self._attention_stats(task)))
        return quality.nll

    def _attention_stats(self, task: Text) -> attention_stats.AttentionStats:
        """Compute the attention statistics on the first held-out windows."""
        batches = -(-self.measure.attention_windows // self.spec.batch_size)
        held_out = islice(task.test_batches(), batches)
        return attention_stats.measure_attention(self.model, held_out, causal=self.causal, device=self.device)

    def _prune(self, nll: float) -> None:
        """Score the model with fewer heads, ranked on the validation split, and with fewer visits."""

        def score() -> float:
            return nll_of(self.spec, self.task, self.model, self.device)

        if reason := pruning.no_heads(self.model):
            self.report({"heads_kept_reason": reason})
        else:
            task, config, setting = self.spec.task()
            found = pruning.importance(
                self.model,
                task(config, replace(setting, test_split="validation")).test_batches(),
                sequences=self.measure.prune_windows,
                causal=self.causal,
                device=self.device,
            )
            self.report(pruning.prune_heads(found, score, nll))
        if self.model.depth_schedule.leaves_out:
            self.report(pruning.prune_visits(self.model, score, nll))

    def _context_use(self, task: Text) -> None:
        use = context_use.measure_context_use(
            self.model,
            task.token_documents,
            seq_len=self.spec.seq_len,
            count=self.measure.history_targets,
            batch_size=self.spec.batch_size,
            device=self.device,
            allowed=task.history_targets(),
        )
        if use:
            self.report(
                {
                    "nll_by_history": use.nll_by_history,
                    "effective_context": use.effective,
                    "effective_context_low": use.low,
                    "effective_context_high": use.high,
                    "best_history": use.best,
                    "context_harm": use.harm,
                    "context_harm_low": use.harm_low,
                }
            )

    def _evaluate_answers(self) -> float:
        with needed_visits.counting(self.model) as needed, counting_loads(self.model) as loads:
            accuracy = measure_accuracy(
                self.model,
                self.task.test_batches(),
                causal=self.causal,
                distance_edges=self.task.distance_edges,
                device=self.device,
            )
        self.report(needed.figures(self.spec))
        self.report(
            {
                "nll": accuracy.nll,
                "accuracy": accuracy.accuracy,
                "guess_accuracy": self.task.guess_accuracy,
                "accuracy_by_distance": accuracy.by_distance,
                "distance_edges": list(self.task.distance_edges) or None,
                "tokens_evaluated": accuracy.tokens,
                **loads.figures(),
            }
        )
        self._reach()
        return accuracy.nll

    def _reach(self) -> None:
        self.report({"reach": reach(self.model, self.spec.seq_len, causal=self.causal)})


def _short(values: list[float] | None) -> list[float] | None:
    """The values with `DIGITS` significant digits, which keep a record small."""
    return None if values is None else [float(f"{value:.{DIGITS - 1}e}") for value in values]
