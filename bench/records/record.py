"""The record: what one cell says, as one flat set of keys.

The keys are public interface (results/README.md explains each). A figure that was not
taken is null, never 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bench.records.migrations import SCHEMA_VERSION

Status = Literal["ok", "unsupported", "oom", "predicted_oom", "timeout", "error", "diverged"]
STATUSES: tuple[str, ...] = get_args(Status)
FINAL: frozenset[str] = frozenset({"ok", "unsupported", "oom", "predicted_oom"})
"""Statuses that a second run of the same sweep does not measure again."""
Tell = Callable[[dict[str, Any]], None]
"""Takes figures by the record's key, as a cell takes them; what has been told survives the cell's process."""


@dataclass(kw_only=True)
class Record:
    """What one cell says. Units stand in the names; None means not taken."""

    # identity
    schema_version: int = SCHEMA_VERSION
    cell_id: str
    name: str
    variant: str
    variant_params: dict[str, Any]
    impl: str | None = None
    seq_len: int
    depth: int
    d_model: int
    heads: int
    ff_chunks: int = 1
    batch_size: int
    activations: str
    objective: str
    data: str
    data_params: dict[str, Any] | None = None
    data_sha256: str
    dtype: str
    device: str
    device_name: str | None = None
    replicate: int
    twin: int = 0
    measure: str | None = None

    # outcome
    status: Status
    reason: str | None = None
    seconds_total: float | None = None
    seconds_work: float | None = None

    # gates
    leak_max_abs: float | None = None
    reference_max_abs: float | None = None
    recompute_max_abs: float | None = None
    cost_ratio: float | None = None
    cost_ratio_reason: str | None = None

    # FLOPs of a step: one forward and backward over batch_size × seq_len tokens
    params: int | None = None
    flops_algorithmic_step: int | None = None
    flops_executed_step: int | None = None
    flops_attention_step: int | None = None
    flops_source: str | None = None

    # memory
    peak_bytes: int | None = None
    peak_bytes_source: str | None = None
    peak_bytes_predicted: int | None = None
    audited: bool | None = None
    peak_phase: str | None = None
    forward_peak_bytes: int | None = None
    backward_peak_bytes: int | None = None
    optimizer_peak_bytes: int | None = None
    peak_grad_bytes: int | None = None
    peak_activation_bytes: int | None = None
    peak_workspace_bytes: int | None = None
    param_bytes: int | None = None
    grad_bytes: int | None = None
    optimizer_bytes: int | None = None
    activation_bytes: int | None = None
    rebuild_error_by_level: list[float] | None = None
    rss_peak_bytes: int | None = None
    cuda_reserved_bytes: int | None = None
    library_bytes: int | None = None
    nvml_process_bytes: int | None = None
    nvml_device_bytes: int | None = None
    device_leftover_bytes: int | None = None
    memory_limit_bytes: int | None = None
    state_bytes: int | None = None

    # what fits into a budget, by prediction
    budget_bytes: int | None = None
    longest_seq_len: int | None = None
    largest_batch_size: int | None = None

    # time
    step_seconds_median: float | None = None
    step_seconds_samples: list[float] | None = None
    forward_seconds_median: float | None = None
    forward_seconds_samples: list[float] | None = None
    tokens_per_second: float | None = None
    forward_tokens_per_second: float | None = None
    sampling_end: str | None = None
    sampling_half_width: float | None = None
    energy_joules_per_token: float | None = None
    mfu: float | None = None
    peak_flops_per_second: float | None = None
    peak_bytes_per_second: float | None = None

    # how cost is claimed to grow
    claimed_time_exponent: float | None = None
    claimed_memory_exponent: float | None = None
    claim_source: str | None = None
    survey_exponent: float | None = None
    claimed_depth_exponent: float | None = None

    # what else went on meanwhile
    contaminated: str | None = None
    load_before: float | None = None
    load_after: float | None = None
    cpu_share: float | None = None
    wait_share: float | None = None
    foreign_cores: float | None = None
    gpu_clock_mhz: int | None = None
    gpu_temperature_celsius: int | None = None
    gpu_power_watts: float | None = None
    gpu_throttling: str | None = None
    gpu_foreign_processes: int | None = None
    gpu_reason: str | None = None

    # quality
    nll: float | None = None
    nll_reset: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    word_perplexity: float | None = None
    unigram_perplexity: float | None = None
    nll_by_position: list[float] | None = None
    nll_by_place: list[float] | None = None
    place_period: int | None = None
    nll_by_history: list[float] | None = None
    effective_context: int | None = None
    effective_context_low: int | None = None
    effective_context_high: int | None = None
    accuracy: float | None = None
    guess_accuracy: float | None = None
    accuracy_by_distance: list[float] | None = None
    distance_edges: list[int] | None = None
    reach: int | None = None
    connected_share: float | None = None
    attention_mass: list[float] | None = None
    attention_mass_uniform: list[float] | None = None
    attention_rank_error: list[float] | None = None
    cluster_mass: float | None = None
    cluster_mass_uniform: float | None = None
    cluster_mass_best: float | None = None
    softmax_error: float | None = None
    softmax_error_initial: float | None = None
    tokens_trained: int | None = None
    tokens_evaluated: int | None = None
    eval_stride: int | None = None
    eval_min_context: int | None = None
    train_seconds: float | None = None
    state_policy: str | None = None
    train_budget: str | None = None
    train_amount: float | None = None
    learning_rate: float | None = None
    diverged_step: int | None = None
    eval_split: str | None = None

    # provenance
    code_sha256: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    torch_version: str | None = None
    python_version: str | None = None
    cpu_model: str | None = None
    threads: int | None = None
    allocator: str | None = None
    gpu_driver: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    load_average: float | None = None

    def to_json(self) -> str:
        """Strict JSON: a line a key, in the order above; non-finite numbers are null."""
        values = _finite(vars(self))
        lines = (f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in values.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def to_line(self) -> str:
        """The same record on one line that ends with a newline; what is null is left out."""
        values = {key: value for key, value in _finite(vars(self)).items() if value is not None}
        return json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n"

    @property
    def age(self) -> tuple[str, str]:
        """What sorts the records of one cell, the newest last; equal for equal records alone."""
        return self.started_at or "", self.to_line()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


KEYS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Record))

REQUIRED: frozenset[str] = frozenset(f.name for f in dataclasses.fields(Record) if f.default is not None)
"""Keys that a file of the present version must have; the others are null where it does not name them."""
