"""The record: what one cell says, as one flat set of keys.

The keys are public interface (results/README.md explains each). A figure that was not
taken is null, never 0. Each key is declared here once, with its type and the values that it may have;
`bench.records.reading` holds files to that.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

from bench.records.bounds import FLOAT, LEAST, WHOLE, Bounds
from bench.records.migrations import SCHEMA_VERSION

Status = Literal["ok", "unsupported", "oom", "predicted_oom", "timeout", "error", "diverged"]
STATUSES: tuple[str, ...] = get_args(Status)
FINAL: frozenset[str] = frozenset({"ok", "unsupported", "oom", "predicted_oom"})
"""Statuses that a second run of the same sweep does not measure again."""
CLOCKS_DIFFER = 300.0
"""Seconds by which the clocks of machines may differ without anyone's being told."""
Tell = Callable[[dict[str, Any]], None]
"""Takes figures by the record's key, as a cell takes them; what has been told survives the cell's process."""

Size = Annotated[int, Bounds(1, WHOLE)]
"""Something there is at least one of, such as a length, a width or bytes that are in use."""
Whole = Annotated[int, Bounds(-WHOLE, WHOLE)]
Count = Annotated[int, Bounds(0, WHOLE)]
Work = Annotated[int, Bounds(0)]
"""FLOPs, which may be more than 64 bits hold."""
Positive = Annotated[float, Bounds(LEAST)]
"""A time or a rate: never 0, and its reciprocal is a number too."""
Perplexity = Annotated[float, Bounds(LEAST, FLOAT)]
"""The exponential of a loss, which may be hundreds of nats."""
Amount = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
Number = Annotated[float, Bounds()]


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
    seq_len: Size
    depth: Size
    d_model: Size
    heads: Size
    ff_chunks: Size = 1
    batch_size: Count
    activations: str
    objective: str
    data: str
    data_params: dict[str, Any] | None = None
    data_sha256: str
    dtype: str
    device: str
    device_name: str | None = None
    replicate: Count
    twin: Count = 0
    measure: str | None = None

    # outcome
    status: Status
    reason: str | None = None
    seconds_total: Amount | None = None
    seconds_work: Amount | None = None

    # gates
    leak_max_abs: Amount | None = None
    reference_max_abs: Amount | None = None
    recompute_max_abs: Amount | None = None
    cost_ratio: Amount | None = None
    cost_ratio_reason: str | None = None

    # FLOPs of a step: one forward and backward over batch_size × seq_len tokens
    params: Size | None = None
    flops_algorithmic_step: Work | None = None
    flops_executed_step: Work | None = None
    flops_attention_step: Work | None = None
    flops_source: str | None = None

    # memory
    peak_bytes: Size | None = None
    peak_bytes_source: str | None = None
    peak_bytes_predicted: Size | None = None
    audited: bool | None = None
    peak_phase: str | None = None
    forward_peak_bytes: Size | None = None
    backward_peak_bytes: Size | None = None
    optimizer_peak_bytes: Size | None = None
    peak_grad_bytes: Count | None = None
    peak_activation_bytes: Count | None = None
    peak_workspace_bytes: Count | None = None
    param_bytes: Size | None = None
    grad_bytes: Count | None = None
    optimizer_bytes: Count | None = None
    activation_bytes: Count | None = None
    rebuild_error_by_level: list[Amount] | None = None
    rss_peak_bytes: Size | None = None
    cuda_reserved_bytes: Count | None = None
    library_bytes: Count | None = None
    nvml_process_bytes: Count | None = None
    nvml_device_bytes: Count | None = None
    device_leftover_bytes: Count | None = None
    memory_limit_bytes: Count | None = None
    state_bytes: Count | None = None

    # what fits into a budget, by prediction
    budget_bytes: Size | None = None
    longest_seq_len: Count | None = None
    largest_batch_size: Count | None = None

    # time
    step_seconds_median: Positive | None = None
    step_seconds_samples: list[Positive] | None = None
    forward_seconds_median: Positive | None = None
    forward_seconds_samples: list[Positive] | None = None
    tokens_per_second: Positive | None = None
    forward_tokens_per_second: Positive | None = None
    sampling_end: str | None = None
    sampling_half_width: Amount | None = None
    energy_joules_per_token: Amount | None = None
    mfu: Share | None = None
    peak_flops_per_second: Positive | None = None
    peak_bytes_per_second: Positive | None = None

    # how cost is claimed to grow
    claimed_time_exponent: Number | None = None
    claimed_memory_exponent: Number | None = None
    claim_source: str | None = None
    survey_exponent: Number | None = None
    claimed_depth_exponent: Number | None = None

    # what else went on meanwhile
    contaminated: str | None = None
    load_before: Amount | None = None
    load_after: Amount | None = None
    cpu_share: Amount | None = None
    wait_share: Amount | None = None
    foreign_cores: Amount | None = None
    gpu_clock_mhz: Count | None = None
    gpu_temperature_celsius: Whole | None = None
    gpu_power_watts: Amount | None = None
    gpu_throttling: str | None = None
    gpu_foreign_processes: Count | None = None
    gpu_reason: str | None = None

    # quality
    nll: Amount | None = None
    nll_reset: Amount | None = None
    perplexity: Perplexity | None = None
    bits_per_byte: Amount | None = None
    word_perplexity: Perplexity | None = None
    unigram_perplexity: Perplexity | None = None
    nll_by_position: list[Amount] | None = None
    nll_by_place: list[Amount] | None = None
    place_period: Size | None = None
    nll_by_history: list[Amount] | None = None
    effective_context: Size | None = None
    effective_context_low: Size | None = None
    effective_context_high: Size | None = None
    accuracy: Share | None = None
    guess_accuracy: Share | None = None
    accuracy_by_distance: list[Share] | None = None
    distance_edges: list[Count] | None = None
    reach: Count | None = None
    connected_share: Share | None = None
    attention_mass: list[Share] | None = None
    attention_mass_uniform: list[Share] | None = None
    attention_rank_error: list[Amount] | None = None
    cluster_mass: Share | None = None
    cluster_mass_uniform: Share | None = None
    cluster_mass_best: Share | None = None
    softmax_error: Amount | None = None
    softmax_error_initial: Amount | None = None
    tokens_trained: Count | None = None
    tokens_evaluated: Count | None = None
    eval_stride: Size | None = None
    eval_min_context: Count | None = None
    train_seconds: Amount | None = None
    state_policy: str | None = None
    train_budget: str | None = None
    train_amount: Amount | None = None
    learning_rate: Positive | None = None
    diverged_step: Size | None = None
    eval_split: str | None = None

    # provenance
    code_sha256: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    torch_version: str | None = None
    python_version: str | None = None
    cpu_model: str | None = None
    threads: Size | None = None
    allocator: str | None = None
    gpu_driver: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    sequence: Count | None = None
    load_average: Amount | None = None

    def to_json(self) -> str:
        """Strict JSON: a line a key, in the order above. Non-finite numbers are null, and bytes of a text
        that are no UTF-8 are written out, as `\\udcff`."""
        values = _storable(vars(self))
        lines = (f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in values.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def to_line(self) -> str:
        """The same record on one line that ends with a newline; what is null is left out."""
        values = {key: value for key, value in _storable(vars(self)).items() if value is not None}
        return json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n"

    @property
    def written(self) -> int:
        """What orders records by when they were measured: `sequence`, or of an older record its date."""
        return microseconds(self.started_at) if self.sequence is None else self.sequence

    def in_future(self, now: float) -> bool:
        """Whether the record is dated later than `now`, in seconds since 1970: a clock ran ahead."""
        return microseconds(self.started_at) > (now + CLOCKS_DIFFER) * 1e6

    @property
    def age(self) -> tuple[int, str, str]:
        """What sorts the records of one cell, the newest last; equal for equal records alone."""
        return self.written, self.started_at or "", self.to_line()


def microseconds(date: str | None) -> int:
    """Microseconds from 1970 to an ISO 8601 date, of UTC where it names no zone; 0 for what is none."""
    try:
        found = datetime.fromisoformat(date or "")
        zoned = found if found.tzinfo else found.replace(tzinfo=UTC)
        return max(0, int(zoned.timestamp() * 1e6))
    except (ValueError, OverflowError):
        return 0


def _storable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_storable(k): _storable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(v) for v in value]
    return value


KEYS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Record))

REQUIRED: frozenset[str] = frozenset(f.name for f in dataclasses.fields(Record) if f.default is not None)
"""Keys that a file of the present version must have; the others are null where it does not name them."""
