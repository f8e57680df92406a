"""Which values a config may hold: names, numbers and sizes. What cannot be is refused in one line."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from bench.inputs.errors import ConfigError, choose
from variants.knobs import unusable_heads

if TYPE_CHECKING:
    from bench.config.parse import Root

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")
TRAIN_BUDGETS = ("tokens", "flops", "seconds")
EVAL_SPLITS = ("test", "validation")
RERUNS = ("none", "contaminated", "oom")
ACTIVATIONS = ("keep", "checkpoint", "sqrt", "selective", "reversible", "offload")


_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for unit, base in (("iB", 1024), ("B", 1000))
    for power, prefix in enumerate("KMGTP", 1)
}


def parse_bytes(knob: str, value: Any) -> int:
    """A size in bytes from 80GiB, 80 GB, 8e10 or a number. Raises ConfigError with examples."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    try:
        size = float(match[1]) * units[match[2].lower()] if match else 0.0
    except (KeyError, ValueError):
        size = 0.0
    if not 1 <= size < 2**63:
        raise ConfigError(f"{knob}={value}: not a size in memory; write it like 80GiB, 80GB, 512MiB or 8e10")
    return int(size)


def batch_size(root: Root) -> int:
    """Sequences, or 0 for as many as fit."""
    value = root.batch_size
    if value == "fit":
        if root.measure.budget is None:
            raise ConfigError("batch_size=fit: needs measure.budget, such as measure.budget=8GiB")
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"batch_size={value}: allowed is 1 or more, or fit with a measure.budget")
    return value


def check_bounds(root: Root) -> None:
    """Raise ConfigError for the first number that cannot be."""
    model, measure = root.model, root.measure
    choose("measure.train_budget", measure.train_budget, TRAIN_BUDGETS)
    choose("measure.eval_split", measure.eval_split, EVAL_SPLITS)
    at_least = {
        "seq_len": (root.seq_len, 1),
        "depth": (root.depth, 1),
        "replicate": (root.replicate, 0),
        "twin": (root.twin, 0),
        "cluster.cells_per_job": (root.cluster.cells_per_job, 1),
        "model.d_model": (model.d_model, 2),
        "model.heads": (model.heads, 1),
        "model.ff_mult": (model.ff_mult, 1),
        "model.ff_chunks": (model.ff_chunks, 1),
        "measure.min_samples": (measure.min_samples, 1),
        "measure.time_seconds": (measure.time_seconds, 0),
        "measure.precision": (measure.precision, 0),
        "measure.train_tokens": (measure.train_tokens, 0),
        "measure.train_flops": (measure.train_flops, 0),
        "measure.train_seconds": (measure.train_seconds, 0),
        "measure.checkpoint_seconds": (measure.checkpoint_seconds, 0),
        "measure.eval_tokens": (measure.eval_tokens, 1 if measure.train_amount else 0),
        "measure.history_targets": (measure.history_targets, 0),
        "measure.place_period": (measure.place_period, 0),
        "measure.attention_windows": (measure.attention_windows, 0),
    }
    for knob, (value, least) in at_least.items():
        if not value >= least:  # so that NaN is refused too
            raise ConfigError(f"{knob}={value}: allowed is {least} or more")
    for knob, amount in (("train_flops", measure.train_flops), ("train_seconds", measure.train_seconds)):
        if amount == math.inf:
            raise ConfigError(f"measure.{knob}={amount}: training has to end; allowed is a finite number")
    given = [name for name in TRAIN_BUDGETS if getattr(measure, f"train_{name}")]
    if given and not measure.train_amount:
        knob = f"measure.train_{measure.train_budget}"
        raise ConfigError(
            f"{knob}=0: measure.train_budget={measure.train_budget} has nothing to spend; "
            f"give {knob}, or take measure.train_budget={given[0]}"
        )
    if not 0 <= root.audit_oom <= 1:
        raise ConfigError(f"audit_oom={root.audit_oom}: allowed is 0 to 1, a share")
    if not 0 <= model.dropout < 1:
        raise ConfigError(f"model.dropout={model.dropout}: allowed is 0 up to below 1")
    if measure.eval_stride is not None and not 1 <= measure.eval_stride <= root.seq_len:
        allowed = f"1 to seq_len={root.seq_len}, or null for windows side by side"
        raise ConfigError(f"measure.eval_stride={measure.eval_stride}: allowed is {allowed}")
    if measure.history_targets == 1:
        raise ConfigError("measure.history_targets=1: one has no spread; allowed is 0 for none, or 2 or more")
    for knob, above in (("learning_rate", measure.learning_rate), ("limit_seconds", measure.limit_seconds)):
        if not above > 0:
            raise ConfigError(f"measure.{knob}={above}: allowed is more than 0")
    if reason := unusable_heads(model.d_model, model.heads):
        raise ConfigError(f"model.{reason}")
