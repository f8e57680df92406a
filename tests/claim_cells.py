"""Builders of cells for tests of claims: small records with a known truth, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from bench import records
from bench.records import Record
from bench.report.data.collect import collect

Cells = list[dict[str, Any]]
TRAINED: dict[str, Any] = {
    "seq_len": 256,
    "tokens_trained": 400_000,
    "learning_rate": 0.003,
    "perplexity": 8.0,
    "unigram_perplexity": 27.0,
    "step_seconds_median": 0.1,
    "flops_algorithmic_step": 10**9,
    "flops_attention_step": 10**8,
    "flops_source": "dispatched",
}


def cell(variant: str, replicate: int = 0, **figures: Any) -> dict[str, Any]:
    """One cell."""
    return {"variant": variant, "replicate": replicate, "variant_params": {}, **figures}


def replicated(variant: str, nll: float, *, spread: float = 0.001, count: int = 3, **figures: Any) -> Cells:
    """Replicates whose losses are `spread` apart, the same way for every variant but for a little."""
    shifts = [spread * (r - (count - 1) / 2) for r in range(count)]
    wobble = [spread * 0.3 * (-1) ** r * (1 + len(variant) % 3) for r in range(count)]
    return [
        cell(variant, r, **{**TRAINED, "nll": nll + shifts[r] + wobble[r], **figures}) for r in range(count)
    ]


def frame_of(cells: Cells, folder: Path) -> pd.DataFrame:
    """The cells as the report reads them back from files."""
    common: dict[str, Any] = {
        "name": "claims",
        "depth": 2,
        "d_model": 64,
        "heads": 2,
        "batch_size": 4,
        "activations": "keep",
        "objective": "clm",
        "data": "plays",
        "data_sha256": "0",
        "dtype": "float32",
        "device": "cpu",
        "status": "ok",
        "measure": "standard",
        "code_sha256": "0",
    }
    known = set(records.KEYS)
    younger: dict[str, dict[str, Any]] = {}
    for number, one in enumerate(cells):
        cell_id = f"{number:04}"
        younger[cell_id] = {key: value for key, value in one.items() if key not in known}
        own = {key: value for key, value in one.items() if key in known}
        record = Record(**{**common, "cell_id": cell_id, **own})
        path = records.path_of(folder, record.cell_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.to_json())
    collected = collect(folder)
    assert not collected.problems
    frame = collected.frame
    for name in sorted({name for values in younger.values() for name in values}):
        frame[name] = [younger[cell_id].get(name) for cell_id in frame["cell_id"]]
    return frame
