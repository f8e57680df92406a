"""One cell inside its own process: check, gate, measure. Figures are told as they are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bench import corpora, environment, gates
from bench.config import Cell, CellSpec
from bench.evaluate import evaluate
from bench.measure import step as step_measure
from bench.measure import timing
from bench.model import LanguageModel
from bench.tasks import text
from bench.train import train
from variants.base import Attention, Dims, VariantConfig

Tell = Callable[[dict[str, Any]], None]
"""Takes figures by the record's key; what has been told survives the process."""


CPU = torch.device("cpu")


class Unsupported(Exception):
    """The cell cannot run; the message is the row's reason."""


class CellRun:
    """The steps of one cell. `run` does them in order."""

    def __init__(self, cell: Cell, tell: Tell) -> None:
        self.cell, self.spec, self.tell = cell, cell.spec, tell
        self.seconds_work = 0.0
        self.variant, self.config, self.dims = self.spec.attention()
        self.device = torch.device(self.spec.device)

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Time spent inside is what was asked for; the rest of the cell is overhead."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_work += time.perf_counter() - begun
            self.tell({"seconds_work": self.seconds_work})

    def run(self) -> None:
        """Take every figure that was asked for.

        Raises Unsupported, gates.GateFailed, train.Diverged, or whatever running out of memory raises.
        """
        self.tell({"threads": torch.get_num_threads(), "device_name": self._device_name()})
        measure = self.spec.measure
        self._refuse()
        if not measure.execute:
            with self._work():
                self._predict()
            return
        corpus = corpora.load(self.spec.data.name, self.spec.data.path)
        if reason := text.too_short(corpus, self.spec.seq_len, quality=measure.train_tokens > 0):
            raise Unsupported(reason)
        with self._work():
            self._gates()
            subject = self._step(corpus)
            self._time(subject)
            del subject
            if measure.train_tokens:
                self._quality(corpus)

    def _device_name(self) -> str | None:
        if self.device.type == "cpu" or not torch.accelerator.is_available():
            return environment.cpu_model()
        return str(torch.get_device_module(self.device).get_device_name(self.device))

    def _refuse(self) -> None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if self.device.type != "cpu" and (accelerator is None or accelerator.type != self.device.type):
            raise Unsupported(f"device={self.spec.device}: this machine, or this torch, has none")
        if reason := self.variant.unsupported(self.config, self.dims, causal=self.spec.causal):
            raise Unsupported(reason)
        if not self.spec.measure.execute:
            if reason := self._missing(CPU):
                raise Unsupported(f"a plan runs on fake tensors of the CPU: {reason}")
        elif reason := self._missing(self.device):
            raise Unsupported(reason)

    def _missing(self, device: torch.device) -> str | None:
        """What the variant lacks on a device, for the cell's dtype or for the gates', which is float32."""
        reasons = (
            self.variant.missing(self.config, self.dims, device=device, dtype=dtype)
            for dtype in (getattr(torch, self.spec.dtype), torch.float32)
        )
        return next((reason for reason in reasons if reason), None)

    def _gates(self) -> None:
        code = environment.code_sha256(self.spec.variant)
        figures = gates.check(self.spec, self.cell.folder, code)
        self.tell({"leak_max_abs": figures.leak_max_abs, "reference_max_abs": figures.reference_max_abs})

    def _build(self) -> LanguageModel:
        torch.manual_seed(self.spec.replicate)
        return build_model(self.spec, self.variant, self.config, self.dims)

    def _batch(self, corpus: corpora.Corpus, step: int) -> text.Batch:
        return text.train_batch(
            corpus,
            seq_len=self.spec.seq_len,
            batch_size=self.spec.batch_size,
            objective=self.spec.objective,
            replicate=self.spec.replicate,
            step=step,
        )

    def _subject(self, batch: Callable[[], text.Batch], device: torch.device) -> step_measure.Subject:
        return step_measure.Subject.make(self._build, batch, causal=self.spec.causal, device=device)

    def _predicted(self) -> step_measure.StepFigures:
        def blank() -> text.Batch:
            tokens = torch.zeros(self.spec.batch_size, self.spec.seq_len, dtype=torch.int64)
            return text.Batch(tokens, tokens.clone())

        return step_measure.predicted(lambda: self._subject(blank, CPU))

    def _predict(self) -> None:
        figures = self._predicted()
        with torch.device("meta"):
            model = self._build()
        self._tell_flops(model, figures, source="predicted")
        self._tell_bytes(figures, source="predicted")
        self.tell({"peak_bytes_predicted": figures.peak_bytes})

    def _step(self, corpus: corpora.Corpus) -> step_measure.Subject:
        def make() -> step_measure.Subject:
            return self._subject(lambda: self._batch(corpus, 0), self.device)

        predicted = None if self._missing(CPU) else self._predicted().peak_bytes
        if self.device.type == "cpu":
            subject, figures = step_measure.on_host(make)
            source = "live_storage"
        else:
            subject, figures = step_measure.on_device(make, self.device)
            source = f"{self.device.type}_allocated"
        self._tell_flops(subject.model, figures, source="dispatched")
        self._tell_bytes(figures, source=source)
        self.tell({"peak_bytes_predicted": predicted})
        return subject

    def _tell_flops(self, model: LanguageModel, figures: step_measure.StepFigures, source: str) -> None:
        forward = model.flops(self.dims, causal=self.spec.causal)
        layer = model.layers[0]
        padding = layer.padding
        ratio = gates.cost_ratio(
            figures.flops_forward, forward.projections, forward.attention, padding, bounded=layer.bounded
        )
        unequal = abs(ratio - 1) > gates.COST_TOLERANCE
        self.tell(
            {
                "impl": layer.impl,
                "params": sum(p.numel() for p in model.parameters()),
                "flops_algorithmic_step": 3 * forward.total,
                "flops_attention_step": 3 * forward.attention,
                "flops_executed_step": figures.flops_step,
                "flops_source": source,
                "cost_ratio": ratio,
                "cost_ratio_reason": padding if unequal else None,
                "state_bytes": sum(layer.state_bytes(self.dims) for layer in model.layers),
            }
        )

    def _tell_bytes(self, figures: step_measure.StepFigures, source: str) -> None:
        self.tell(
            {
                "peak_bytes": figures.peak_bytes,
                "peak_bytes_source": source,
                "peak_phase": figures.peak_phase,
                "forward_peak_bytes": figures.phase_peak_bytes["forward"],
                "backward_peak_bytes": figures.phase_peak_bytes["backward"],
                "optimizer_peak_bytes": figures.phase_peak_bytes["optimizer"],
                "peak_grad_bytes": figures.at_peak["gradients"],
                "peak_activation_bytes": figures.at_peak["activations"],
                "peak_workspace_bytes": figures.at_peak["workspace"],
                "param_bytes": figures.param_bytes,
                "grad_bytes": figures.grad_bytes,
                "optimizer_bytes": figures.optimizer_bytes,
                "activation_bytes": figures.activation_bytes,
                "rss_peak_bytes": figures.rss_peak_bytes,
                "cuda_reserved_bytes": figures.reserved_bytes,
            }
        )

    def _time(self, subject: step_measure.Subject) -> None:
        measure, tokens = self.spec.measure, self.spec.batch_size * self.spec.seq_len

        def sample(work: Callable[[], object]) -> list[float]:
            return timing.sample(
                work, self.device, seconds=measure.time_seconds, at_least=measure.min_samples
            )

        steps = sample(subject.step)
        subject.optimizer.zero_grad(set_to_none=True)
        subject.model.eval()
        forwards = sample(subject.forward)
        self.tell(
            {
                "step_seconds_median": timing.median(steps),
                "step_seconds_samples": steps,
                "forward_seconds_median": timing.median(forwards),
                "forward_seconds_samples": forwards,
                "tokens_per_second": tokens / timing.median(steps),
                "forward_tokens_per_second": tokens / timing.median(forwards),
            }
        )

    def _quality(self, corpus: corpora.Corpus) -> None:
        measure, spec = self.spec.measure, self.spec
        model = self._build().to(self.device)

        def batches(step: int) -> text.Batch:
            return text.Batch(*(tensor.to(self.device) for tensor in self._batch(corpus, step)))

        begun = time.perf_counter()
        trained = train(
            model,
            batches,
            tokens=measure.train_tokens,
            learning_rate=measure.learning_rate,
            causal=spec.causal,
        )
        seconds = time.perf_counter() - begun
        quality = evaluate(
            model,
            text.held_out_batches(
                corpus.test,
                seq_len=spec.seq_len,
                batch_size=spec.batch_size,
                objective=spec.objective,
                max_tokens=measure.eval_tokens,
            ),
            objective=spec.objective,
            words_per_byte=corpus.words_per_byte(),
            unigram_nats=corpus.unigram_nats(),
            device=self.device,
        )
        self.tell(
            {
                "nll": quality.nll,
                "perplexity": quality.perplexity,
                "bits_per_byte": quality.bits_per_byte,
                "word_perplexity": quality.word_perplexity,
                "unigram_perplexity": quality.unigram_perplexity,
                "nll_by_position": quality.nll_by_position,
                "tokens_trained": trained,
                "tokens_evaluated": quality.tokens,
                "train_seconds": seconds,
                "state_policy": "carried" if self.variant.caps.stateful else "none",
            }
        )


def build_model(spec: CellSpec, variant: type[Attention], config: VariantConfig, dims: Dims) -> LanguageModel:
    """The model of a cell; whoever calls seeds first."""
    return LanguageModel(
        variant,
        config,
        replace(dims, batch_size=1),
        depth=spec.depth,
        ff_mult=spec.model.ff_mult,
        ff_chunks=spec.model.ff_chunks,
        dropout=spec.model.dropout,
        vocabulary=text.VOCABULARY,
        activations=spec.activations,
        dtype=getattr(torch, spec.dtype),
    )
