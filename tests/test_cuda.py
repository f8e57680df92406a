"""What can only be seen on a CUDA device: `make test-cuda` there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import variants

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", variants.names())
def test_a_cell_runs_gated_and_its_predicted_peak_is_near_the_allocator_s(
    variant: str, dtype: str, tmp_path: Path
) -> None:
    cell = [f"variant={variant}", f"dtype={dtype}", "device=cuda", "seq_len=1024", "model=small"]
    command = [sys.executable, "-m", "bench", *cell, "data=stdlib", "measure=quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results/adhoc/records").glob("*.json")
    record = json.loads(path.read_text())
    if record["status"] == "unsupported":
        assert record["reason"]
        return
    assert record["status"] == "ok", record["reason"]
    assert record["peak_bytes_source"] == "cuda_allocated"
    assert record["reference_max_abs"] is not None
    # the prediction takes the CPU's kernels and knows no library workspaces
    assert record["peak_bytes"] == pytest.approx(record["peak_bytes_predicted"], rel=0.25, abs=64 * 2**20)
