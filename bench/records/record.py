"""The record: the results of one cell, as one flat set of keys.

The keys are public interface (results/README.md explains each). A figure that was not taken is null, never 0.
Each key is declared once, here, with its type and allowed values; `bench.records.reading` checks files
against these declarations.

Over 300 lines: it is a list of keys, which is read by searching.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

from bench.records.bounds import FLOAT, MAX_INT, MIN_FIGURE, Bounds
from bench.records.migrations import SCHEMA_VERSION

Status = Literal["ok", "unsupported", "oom", "predicted_oom", "timeout", "error", "diverged"]
STATUSES: tuple[str, ...] = get_args(Status)
FINAL: frozenset[str] = frozenset({"ok", "unsupported", "oom", "predicted_oom"})
"""Statuses that a second run of the same sweep does not measure again."""
CLOCKS_DIFFER = 300.0
"""Difference between the clocks of machines, in seconds, that is accepted without a warning."""
Report = Callable[[dict[str, Any]], None]
"""Receives figures, by record key, as soon as a cell has taken them.
Figures that were reported survive the cell's process."""

Size = Annotated[int, Bounds(1, MAX_INT)]
"""A quantity of at least one, such as a length, a width or the bytes in use."""
Whole = Annotated[int, Bounds(-MAX_INT, MAX_INT)]
Count = Annotated[int, Bounds(0, MAX_INT)]
Work = Annotated[int, Bounds(0)]
"""FLOPs, which may exceed 64 bits."""
Positive = Annotated[float, Bounds(MIN_FIGURE)]
"""A time or a rate: never 0, and its reciprocal is finite."""
Perplexity = Annotated[float, Bounds(MIN_FIGURE, FLOAT)]
"""The exponential of a loss; the loss may be hundreds of nats."""
Amount = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
Number = Annotated[float, Bounds()]


SLOTS = ("feed_forward", "stack")
"""Keys for the parts of a model, beside its variant, that are chosen by name. The default of a key is the
part that all models had before there was a choice."""
NOT_COMPILED = "off"
"""The value of `compile` for a cell that is not compiled."""
MODEL_OPTIONS = {
    "vocab_size": "that of the data",
    "tie_embeddings": "untied",
    "rotary_base": "10000",
    "head_size": "width / heads",
    "kv_heads": "heads",
    "widen_feed_forward": "as wide as usual",
    "embedding_size": "width",
    "norm": "layer",
    "norm_position": "pre",
    "residual": "plain",
    "dropout": "0",
}
"""Options of the model, and their usual values as tables write them. Older records, without these keys,
are taken to have them."""
SWITCHED_ON = {"tie_embeddings": "tied", "widen_feed_forward": "wider"}
"""The words of tables for options that are true."""


@dataclass(kw_only=True)
class Record:
    """The results of one cell. Names contain their units; None means that a figure was not taken."""

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
    feed_forward: str = "mlp"
    feed_forward_params: dict[str, Any] | None = None
    stack: str = "stack"
    stack_params: dict[str, Any] | None = None
    ff_chunks: Size = 1
    vocab_size: Size | None = None
    tie_embeddings: bool | None = None
    rotary_base: Amount | None = None
    head_size: Size | None = None
    kv_heads: Size | None = None
    widen_feed_forward: bool | None = None
    embedding_size: Size | None = None
    norm: str | None = None
    norm_position: str | None = None
    residual: str | None = None
    dropout: Amount | None = None
    batch_size: Count
    activations: str
    compile: str | None = None
    objective: str
    data: str
    data_params: dict[str, Any] | None = None
    data_sha256: str
    data_documents: Count | None = None
    data_bytes: Count | None = None
    data_tokens: Count | None = None
    data_skipped: str | None = None
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
    reference_max_abs_reason: str | None = None
    dtype_reference_rms: Amount | None = None
    dtype_reference_row_rms: Amount | None = None
    recompute_max_abs: Amount | None = None
    cost_ratio: Amount | None = None
    cost_ratio_reason: str | None = None

    # FLOPs and traffic of a step: one forward and backward over batch_size × seq_len tokens
    params: Size | None = None
    params_active: Size | None = None
    flops_algorithmic_step: Work | None = None
    flops_executed_step: Work | None = None
    flops_attention_step: Work | None = None
    flops_source: str | None = None
    attention_kernels: str | None = None
    launches_step: Count | None = None
    bytes_moved_step: Count | None = None
    step_seconds_estimated: Positive | None = None
    estimate_card: str | None = None

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

    # predicted sizes that fit into a memory budget
    budget_bytes: Size | None = None
    reserve: Amount | None = None
    longest_seq_len: Count | None = None
    largest_batch_size: Count | None = None

    # time
    step_seconds_median: Positive | None = None
    step_seconds_samples: list[Positive] | None = None
    forward_seconds_median: Positive | None = None
    forward_seconds_samples: list[Positive] | None = None
    tokens_per_second: Positive | None = None
    forward_tokens_per_second: Positive | None = None
    device_seconds_step: Positive | None = None
    launch_seconds: Positive | None = None
    launch_bound: bool | None = None
    compile_seconds: Amount | None = None
    graph_breaks: Count | None = None
    recompiles: Count | None = None
    sampling_end: str | None = None
    warm_up_runs: Count | None = None
    step_precision: Amount | None = None
    forward_precision: Amount | None = None
    energy_joules_per_token: Amount | None = None
    mfu: Share | None = None
    peak_flops_per_second: Positive | None = None
    peak_bytes_per_second: Positive | None = None

    # decoding: a prompt of seq_len tokens, then tokens one by one
    decode_reason: str | None = None
    decode_max_abs: Amount | None = None
    decode_source: str | None = None
    decode_state_bytes: Count | None = None
    decode_weight_bytes: Size | None = None
    prefill_peak_bytes: Size | None = None
    decode_peak_bytes: Size | None = None
    decode_launches: Count | None = None
    decode_bytes_moved: Count | None = None
    decode_flops: Count | None = None
    prefill_seconds_median: Positive | None = None
    prefill_seconds_samples: list[Positive] | None = None
    decode_seconds_median: Positive | None = None
    decode_seconds_p95: Positive | None = None
    decode_seconds_samples: list[Positive] | None = None
    decode_block: Size | None = None
    decode_block_seconds_median: Positive | None = None
    decode_largest_batch: Count | None = None
    decode_batch_size: Size | None = None
    decode_batch_seconds_median: Positive | None = None

    # claimed growth of cost
    claimed_time_exponent: Number | None = None
    claimed_memory_exponent: Number | None = None
    claim_source: str | None = None
    survey_exponent: Number | None = None
    claimed_depth_exponent: Number | None = None

    # other load during the measurement
    contaminated: str | None = None
    attempts: Size | None = None
    load_before: Amount | None = None
    load_after: Amount | None = None
    cpu_share: Amount | None = None
    wait_share: Amount | None = None
    foreign_cores: Amount | None = None
    gpu_clock_mhz: Count | None = None
    gpu_memory_clock_mhz: Count | None = None
    gpu_temperature_celsius: Whole | None = None
    gpu_power_watts: Amount | None = None
    gpu_power_limit_watts: Amount | None = None
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
    ngram_bits_per_byte: list[Amount] | None = None
    ngram_train_bytes: Size | None = None
    gzip_bits_per_byte: Amount | None = None
    xz_bits_per_byte: Amount | None = None
    zstd_bits_per_byte: Amount | None = None
    nll_by_position: list[Amount] | None = None
    nll_by_place: list[Amount] | None = None
    place_period: Size | None = None
    nll_by_block: list[Amount] | None = None
    nll_reset_by_block: list[Amount] | None = None
    block_targets: list[Count] | None = None
    block_documents: list[Count] | None = None
    nll_by_answer: list[Amount] | None = None
    nll_by_history: list[Amount] | None = None
    effective_context: Size | None = None
    effective_context_low: Size | None = None
    effective_context_high: Size | None = None
    best_history: Size | None = None
    context_harm: Amount | None = None
    context_harm_low: Number | None = None
    positions: str | None = None
    longer_lengths: list[Size] | None = None
    nll_longer: list[Amount] | None = None
    nll_longer_error: list[Amount] | None = None
    bits_per_byte_longer: list[Amount] | None = None
    nll_longer_by_position: list[Amount] | None = None
    longer_memory_positions: list[Count] | None = None
    nll_longer_memory: list[Amount] | None = None
    nll_longer_memory_error: list[Amount] | None = None
    tokens_evaluated_longer: Count | None = None
    longer_reason: str | None = None
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
    sink_mass: Share | None = None
    sink_mass_uniform: Share | None = None
    softmax_error: Amount | None = None
    softmax_error_initial: Amount | None = None
    train_budgets: list[Count] | None = None
    nll_by_budget: list[Amount] | None = None
    bits_per_byte_by_budget: list[Amount] | None = None
    validation_tokens: list[Count] | None = None
    validation_nll: list[Amount] | None = None
    tokens_trained: Count | None = None
    epochs: Amount | None = None
    visits_per_token: Amount | None = None
    flops_needed_forward: Work | None = None
    heads_kept: list[Count] | None = None
    nll_heads_kept: list[Amount] | None = None
    heads_kept_reason: str | None = None
    visits_kept: list[Count] | None = None
    nll_visits_kept: list[Amount] | None = None
    tokens_evaluated: Count | None = None
    dropped_tokens_share: Share | None = None
    busiest_expert_share: Share | None = None
    bytes_evaluated: Count | None = None
    eval_stride: Size | None = None
    eval_min_context: Count | None = None
    train_seconds: Amount | None = None
    state_policy: str | None = None
    train_budget: str | None = None
    train_amount: Amount | None = None
    schedule: str | None = None
    train_state: str | None = None
    learning_rate: Positive | None = None
    learning_rates_tried: list[Positive] | None = None
    learning_rate_nlls: list[Amount] | None = None
    search_budget: str | None = None
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
    cudnn_version: Count | None = None
    tf32: str | None = None
    device_allocator: str | None = None
    deterministic: bool | None = None
    started_at: str | None = None
    ended_at: str | None = None
    sequence: Count | None = None
    load_average: Amount | None = None

    def to_json(self) -> str:
        """Return strict JSON with one line per key, in the order above. Non-finite numbers become null, and
        bytes of a text that are not UTF-8 are escaped as `\\udcff`."""
        values = _storable(vars(self))
        lines = (f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in values.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def to_line(self) -> str:
        """Return the record as one line that ends with a newline, without the keys that are null."""
        values = {key: value for key, value in _storable(vars(self)).items() if value is not None}
        return json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n"

    @property
    def order(self) -> int:
        """Sort key for the time of measurement: `sequence`, or the date of an older record without one."""
        return microseconds(self.started_at) if self.sequence is None else self.sequence

    def in_future(self, now: float) -> bool:
        """Return whether the record's date is later than `now` (seconds since 1970),
        because a clock was ahead."""
        return microseconds(self.started_at) > (now + CLOCKS_DIFFER) * 1e6

    @property
    def recency(self) -> tuple[int, str, str]:
        """Sort key for records of one cell, the newest last; equal only for equal records."""
        return self.order, self.started_at or "", self.to_line()


def microseconds(date: str | None) -> int:
    """Return the microseconds from 1970 to an ISO 8601 date (UTC if it has no time zone);
    0 for an invalid date."""
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
"""Keys that a file of the current version must have. Other keys are null if the file lacks them."""
