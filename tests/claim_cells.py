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
    for number, one in enumerate(cells):
        record = Record(**{**common, "cell_id": f"{number:04}", **one})
        path = records.path_of(folder, record.cell_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.to_json())
    collected = collect(folder)
    assert not collected.problems
    return collected.frame
