"""Cost of generating: a prompt, then tokens one by one, in blocks, and in the largest batch that fits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.config.spec import CellSpec, MeasureSpec
from bench.measure import contention, decoding, timing
from bench.measure.decoding import Decoding, DecodingFigures
from bench.measure.gate_failed import GateFailed
from bench.measure.predict import build_model
from bench.model.decode import Decoder, decoding_bytes, no_decoding
from bench.records import Report

BLOCKS = 8
"""Blocks whose time is taken."""
WARM_UP = 3
"""Tokens that are read before their time is taken."""
QUANTILE = 0.95


def reason_not_to_decode(spec: CellSpec) -> str | None:
    """Return why the model of a cell cannot be decoded, or None."""
    if not spec.causal:
        return "a model that reads later tokens cannot be decoded"
    with torch.device("meta"):
        return no_decoding(build_model(spec))


def room(spec: CellSpec) -> int:
    """Return the number of tokens after the prompt that a cell reads."""
    measure = spec.measure
    return WARM_UP + measure.decode_tokens + (1 + BLOCKS) * measure.decode_block


def batch_tokens(measure: MeasureSpec) -> int:
    """Return the number of tokens whose time is taken in the largest batch."""
    return max(3, measure.decode_tokens // 8)


class DecodingMeasurement:
    """The figures of decoding of one cell. `run` reports them."""

    def __init__(self, spec: CellSpec, device: torch.device, *, limit: int, report: Report) -> None:
        """`limit`: bytes that the cell may use on its device."""
        self.spec, self.device, self.limit, self.report = spec, device, limit, report
        self.room = room(spec)

    def predict(self) -> None:
        """Report what follows from shapes."""
        self._report(decoding.predicted(self.spec, room=self.room), "predicted")
        self._largest_batch()

    def run(self) -> None:
        """Measure. Raises GateFailed if the states do not have the stated size."""
        subject = Decoding(self.spec, self.device, room=self.room)
        self._report(subject.figures, "measured")
        monitor = contention.ContentionMonitor(self.device)
        measure = self.spec.measure
        prefill = timing.sample(
            subject.prefill,
            self.device,
            seconds=measure.time_seconds,
            at_least=measure.min_samples,
            precision=measure.precision,
        )
        token, block = subject.tokens(), subject.tokens(measure.decode_block)
        decoder = subject.decoder
        self._seconds(lambda: decoder.read(token), WARM_UP)
        tokens = self._seconds(lambda: decoder.read(token), measure.decode_tokens)
        self._seconds(lambda: decoder.read_all(block), 1)
        blocks = self._seconds(lambda: decoder.read_all(block), BLOCKS)
        load = monitor.end()
        if measure.step and not load["contaminated"]:  # the load while the step was timed is in the record
            load = {}
        self.report(
            {
                "prefill_seconds_median": prefill.median,
                "prefill_seconds_samples": prefill.seconds,
                "decode_seconds_median": statistics.median(tokens),
                "decode_seconds_p95": _quantile(tokens),
                "decode_seconds_samples": tokens,
                "decode_block": measure.decode_block,
                "decode_block_seconds_median": statistics.median(blocks),
                **load,
            }
        )
        self._largest_batch()

    def _seconds(self, work: Callable[[], object], times: int) -> list[float]:
        """The times of so many calls."""
        taken = []
        for _ in range(times):
            begun = time.perf_counter()
            work()
            timing.synchronize(self.device)
            taken.append(time.perf_counter() - begun)
        return taken

    def _report(self, figures: DecodingFigures, source: str) -> None:
        spec = replace(self.spec, seq_len=self.spec.seq_len + self.room)
        with torch.device("meta"):
            model = build_model(spec)
        work = replace(spec.workload(), element_bytes=torch.finfo(getattr(torch, spec.dtype)).bits // 8)
        stated = decoding_bytes(model, work)
        if figures.state_bytes != stated:
            raise GateFailed(f"decoding gate: states of {figures.state_bytes:,} bytes; {stated:,} are stated")
        self.report(
            {
                "decode_source": source,
                "decode_state_bytes": figures.state_bytes,
                "decode_weight_bytes": figures.weight_bytes,
                "prefill_peak_bytes": figures.prefill_peak_bytes,
                "decode_peak_bytes": figures.decode_peak_bytes,
                "decode_launches": figures.launches,
                "decode_bytes_moved": figures.bytes_moved,
                "decode_flops": figures.flops,
            }
        )

    def _largest_batch(self) -> None:
        """Predict the largest batch that fits into the budget and, if the cell runs, measure it."""
        measure = self.spec.measure
        if measure.budget is None:
            return
        usable = int(measure.budget * (1 - measure.reserve))
        found = decoding.largest_batch(self.spec, usable, room=self.room)
        self.report({"decode_largest_batch": found})
        if not measure.execute or not found or usable > self.limit:
            return
        single = Decoding(replace(self.spec, batch_size=1), self.device, room=self.room)
        decoder = Decoder(single.model, found, self.spec.seq_len + self.room)
        decoder.copy_from(single.decoder)
        token = single.tokens().expand(found, -1)
        self._seconds(lambda: decoder.read(token), WARM_UP)
        taken = self._seconds(lambda: decoder.read(token), batch_tokens(measure))
        self.report({"decode_batch_size": found, "decode_batch_seconds_median": statistics.median(taken)})


def _quantile(taken: list[float]) -> float:
    """The 95th percentile: the smallest time that is not exceeded by so many."""
    return sorted(taken)[min(len(taken) - 1, int(QUANTILE * len(taken)))]
