"""Estimated duration of a sweep on a card: its rounds, and the time until the first table with perplexities.

Launches, bytes and FLOPs of a step are counted on fake tensors and converted to seconds as in
`bench.measure.estimate`; how often a step runs follows from the knobs of `measure`. What is not a step has a
constant time. It is an estimate for one device. An upper bound in one respect: sampling may end earlier.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

from bench.config.spec import Cell, CellSpec, MeasureSpec, digest
from bench.evaluate import longer, pruning
from bench.measure import decoding, timing
from bench.measure.decoding import DecodingFigures
from bench.measure.device_time import STEPS
from bench.measure.estimate import CARDS, Card, estimated_seconds
from bench.measure.gates import GATE_TOKENS
from bench.measure.predict import CPU, Prediction, build_model
from bench.measure.step import StepFigures
from bench.report.text import markdown, units
from bench.report.text.columns import Column
from bench.run.prepare import order_in_rounds
from bench.run.progress import duration
from bench.scenarios import decoding as decoding_runs
from bench.scenarios.support import Unsupported, check_supported, missing_kernel
from bench.train.schedule import Budget

START_SECONDS = 8.0
"""A cell's process: device context, first use of libraries, corpus, plan of its memory. Assumed."""
GATE_SECONDS = 5.0
"""Gates of a configuration, which later cells of the experiment reuse. Assumed."""
COUNTED_LAUNCH_SECONDS = 0.3e-3
"""Additional time of the host for a launch whose FLOPs and memory are counted. Measured on a CPU."""
COUNTED_STEPS = 2
FORWARD_SHARE = 1 / 3
"""Forward pass ÷ step."""
REPORT_SECONDS = 15.0
"""A report during the sweep. Assumed."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Estimated seconds of cells, by what is done."""

    start: float = 0.0
    gates: float = 0.0
    cost: float = 0.0
    decoding: float = 0.0
    training: float = 0.0
    evaluation: float = 0.0
    reports: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(astuple(self)))

    def __add__(self, other: Seconds) -> Seconds:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Seconds(**{field.name: a + b for field, (a, b) in zip(fields(self), pairs, strict=True)})


@dataclass(frozen=True)
class Planned:
    """The figures of a cell on fake tensors."""

    step: StepFigures
    token: DecodingFigures | None = None
    """None if the cell does not decode."""

    def peak_bytes(self, measure: MeasureSpec) -> int:
        """The largest peak of what the cell runs."""
        trains = measure.step or measure.train_amount
        peaks = [self.step.peak_bytes] if trains or self.token is None else []
        if self.token is not None:
            peaks += [self.token.prefill_peak_bytes, self.token.decode_peak_bytes]
        return max(peaks)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated duration of a sweep on one device."""

    rounds: dict[int, tuple[int, Seconds]]
    """Replicate → number of cells, and their time."""
    first_table: tuple[float, int] | None
    """Seconds until the first report with perplexities, and its number of trained cells; None if there is no
    report during the sweep, or nothing is trained."""
    trained: int
    """Trained cells of the first round that has any."""
    peak_bytes: int
    """Largest predicted peak of a training step, or of decoding."""
    unplanned: tuple[str, ...]
    """Labels of the cells that a machine without the device cannot plan; only their start is counted."""

    @property
    def total(self) -> Seconds:
        """The time of the whole sweep."""
        return sum((seconds for _, seconds in self.rounds.values()), Seconds())


def estimate(cells: Sequence[Cell], card: Card) -> Estimate:
    """Return the estimated duration of the cells, in the order in which a sweep runs them."""
    cells = order_in_rounds(cells)
    gated: set[str] = set()
    planned: dict[str, Planned | None] = {}
    rounds: dict[int, tuple[int, Seconds]] = {}
    left = {replicate: sum(c.spec.replicate == replicate for c in cells) for replicate in _replicates(cells)}
    passed = reported = 0.0
    peak, trained, first_table, unplanned = 0, 0, None, []
    for cell in cells:
        spec = cell.spec
        reads = decoding_runs.room(spec) if spec.measure.decode_tokens else 0
        plain = replace(spec, replicate=0, twin=0, measure=MeasureSpec(execute=False))
        setting = repr((plain, reads))
        if setting not in planned:
            planned[setting] = plan(spec)
        figures = planned[setting]
        key = gate_key(spec)
        seconds = cell_seconds(spec, figures, card, is_gated=key in gated)
        gated.add(key)
        if figures is None:
            unplanned.append(spec.label)
        else:
            peak = max(peak, figures.peak_bytes(spec.measure))
        left[spec.replicate] -= 1
        trained += bool(seconds.training)
        passed += seconds.total
        is_last = left[spec.replicate] == 0
        if cell.report_minutes is not None and (is_last or passed - reported >= 60 * cell.report_minutes):
            seconds += Seconds(reports=REPORT_SECONDS)
            passed += REPORT_SECONDS
            reported = passed
            if trained and first_table is None:
                first_table = passed, trained
        count, before = rounds.get(spec.replicate, (0, Seconds()))
        rounds[spec.replicate] = count + 1, before + seconds
    first = next((c.spec.replicate for c in cells if c.spec.measure.train_amount), None)
    return Estimate(
        rounds=rounds,
        first_table=first_table,
        trained=sum(c.spec.replicate == first and c.spec.measure.train_amount > 0 for c in cells),
        peak_bytes=peak,
        unplanned=tuple(unplanned),
    )


def _replicates(cells: Sequence[Cell]) -> list[int]:
    return list(dict.fromkeys(cell.spec.replicate for cell in cells))


def gate_key(spec: CellSpec) -> str:
    """Identify the gates of a cell, as `bench.measure.gates.check` caches them."""
    decides: list[Any] = [spec.variant, spec.variant_params, spec.model.heads, min(spec.seq_len, GATE_TOKENS)]
    decides += [spec.causal, spec.dtype, spec.activations, spec.feed_forward.name]
    return digest(decides)


def plan(spec: CellSpec) -> Planned | None:
    """Return the figures of a step, and of decoding; None if no machine can run the cell, or this one cannot
    plan it."""
    planned = replace(spec, measure=replace(spec.measure, execute=False))
    print(f"estimate: {spec.label}", file=sys.stderr, flush=True)
    try:
        check_supported(planned)
    except Unsupported:
        return None
    if missing_kernel(planned, CPU):
        return None
    token = None
    if spec.measure.decode_tokens and not decoding_runs.reason_not_to_decode(planned):
        token = decoding.predicted(planned, room=decoding_runs.room(spec))
    return Planned(Prediction(planned).predict(), token)


def cell_seconds(spec: CellSpec, figures: Planned | None, card: Card, *, is_gated: bool) -> Seconds:
    """Return the estimated time of a cell from its plan."""
    if figures is None:
        return Seconds(start=START_SECONDS)
    measure, of_step = spec.measure, figures.step
    step = estimated_seconds(of_step.launches_step, of_step.bytes_moved_step, of_step.flops_step, card)
    forward = FORWARD_SHARE * step
    cost = 0.0
    if measure.step:
        counted = COUNTED_STEPS * (step + COUNTED_LAUNCH_SECONDS * of_step.launches_step)
        cost = counted + _sampling(step, spec) + STEPS * step + _sampling(forward, spec)
    training = evaluation = 0.0
    if measure.train_amount:
        tokens = max(1, spec.batch_size) * spec.seq_len
        training = _training(spec, step, tokens)
        variant, config, _ = spec.attention()
        is_stateful = variant.info_for(config).caps.stateful
        passes = 2 if is_stateful else 1
        histories = spec.seq_len.bit_length() * _batches(spec) if spec.causal else 0
        evaluation = (passes * max(1.0, measure.eval_tokens / tokens) + histories) * forward
        if measure.longer and spec.causal:
            wanted = measure.longer, measure.longer_targets
            read = longer.tokens_read(spec.seq_len, *wanted, has_memory=is_stateful)
            evaluation += read / tokens * forward
        if measure.prune_windows:
            again = len(pruning.KEPT) - 1
            if spec.model_spec().leaves_out(spec.depth):
                again += len(pruning.LEFT_OUT)
            evaluation += again * passes * max(1.0, measure.eval_tokens / tokens) * forward
            evaluation += measure.prune_windows * spec.seq_len / tokens * step
    return Seconds(
        start=START_SECONDS,
        gates=0.0 if is_gated else GATE_SECONDS,
        cost=cost,
        decoding=_decoding(spec, forward, figures.token, card) if figures.token else 0.0,
        training=training,
        evaluation=evaluation,
    )


def _decoding(spec: CellSpec, prompt: float, token: DecodingFigures, card: Card) -> float:
    """Return the time of prompts, which are forward passes, of tokens, and of the largest batch."""
    measure = spec.measure
    without_optimiser = replace(card, seconds_per_step=0.0)
    once = estimated_seconds(token.launches, token.bytes_moved, token.flops, without_optimiser)
    seconds = prompt + _sampling(prompt, spec) + decoding_runs.room(spec) * once
    if measure.budget is not None:  # every token reads the states of the batch
        batch = estimated_seconds(token.launches, measure.budget, token.flops, without_optimiser)
        seconds += prompt + (decoding_runs.WARM_UP + decoding_runs.batch_tokens(measure)) * batch
    return seconds


def _batches(spec: CellSpec) -> int:
    """Batches of the longest history; shorter histories have fewer."""
    return -(-spec.measure.history_targets // max(1, spec.batch_size))


def _sampling(run: float, spec: CellSpec) -> float:
    """Return the time of the samples of a function that takes `run` seconds, if none ends early."""
    least = max(timing.ACCELERATOR_SAMPLES, spec.measure.min_samples)
    by_time = min(timing.MAX_SAMPLES, int(spec.measure.time_seconds / run) + 1)
    return run * (timing.ACCELERATOR_WARM_UP + max(least, by_time))


def _training(spec: CellSpec, step: float, tokens: int) -> float:
    measure = spec.measure
    flops = 0
    if measure.train_budget == "flops":
        import torch

        with torch.device("meta"):
            flops = 3 * build_model(spec).cost(spec.workload()).total
    budget = Budget.of(measure, step_tokens=tokens, step_flops=flops)
    if budget.steps is None:
        return budget.seconds
    steps = budget.steps + budget.steps_of_branches
    if measure.learning_rate == "search" and spec.replicate == 0 and spec.twin == 0:
        steps += len(measure.search_rates) * (
            steps if measure.search_budget == "largest" else budget.all_steps[0]
        )
    return steps * step


def text(cells: Sequence[Cell], card_name: str) -> str:
    """Return the estimate in words: a table of the rounds, and what the README states."""
    card = CARDS[card_name]
    whole = estimate(cells, card)
    rows = [*whole.rounds.items(), ("all", (len(cells), whole.total))]
    kinds = [field.name for field in fields(Seconds)]
    columns = [
        Column("round", [str(name) for name, _ in rows], right=False),
        Column("cells", [str(count) for _, (count, _) in rows]),
        *(Column(kind, [duration(getattr(s, kind)) for _, (_, s) in rows]) for kind in kinds),
        Column("total", [duration(seconds.total) for _, (_, seconds) in rows]),
    ]
    lines = [
        f"Estimated duration on one {card.title}, not a measurement: steps by launches, bytes and FLOPs with "
        f"{units.seconds(card.seconds_per_launch)} a launch; {START_SECONDS:g} s to start a cell.",
        "",
        markdown.table(columns).rstrip("\n"),
        "",
        f"Largest predicted peak: {units.size(whole.peak_bytes)}.",
    ]
    if whole.first_table:
        seconds, trained = whole.first_table
        lines.append(
            f"First report with perplexities: after {duration(seconds)}, of {trained} of the "
            f"{whole.trained} trained cells of its round."
        )
    if whole.unplanned:
        lines.append(f"Not planned here, only their start is counted: {', '.join(whole.unplanned)}.")
    return "\n".join(lines)
