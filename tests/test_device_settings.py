"""Settings of an accelerator in a record, and in a report where there are any."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from test_report import record, table, write

from bench.measure.device_settings import ALLOCATOR_VARIABLES, device_settings
from bench.records import KEYS
from bench.report import build
from bench.report.text.marks import MATH

SETTINGS = {
    "cudnn_version": 91501,
    "tf32": "convolutions",
    "device_allocator": "native; PYTORCH_ALLOC_CONF=expandable_segments:True",
    "deterministic": False,
    "gpu_power_limit_watts": 700.0,
}
GPU = {"device": "cuda", "device_name": "Example GPU"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    return monkeypatch


def test_settings_have_keys_and_follow_torch(environment: pytest.MonkeyPatch) -> None:
    found = device_settings(torch.device("cuda"))
    assert {*found} < {*KEYS}
    assert (found["cudnn_version"], found["device_allocator"], found["deterministic"]) == (
        91501,
        "native",
        False,
    )
    environment.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert "matrix products" not in device_settings(torch.device("cuda"))["tf32"]
        torch.set_float32_matmul_precision("high")
        found = device_settings(torch.device("cuda"))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert found["tf32"].startswith("matrix products")
    assert found["device_allocator"] == "native; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def test_a_cpu_has_none() -> None:
    assert device_settings(torch.device("cpu")) == {}


@pytest.mark.slow
def test_the_report_shows_settings_where_they_exist(tmp_path: Path) -> None:
    report = build(write(tmp_path / "gpu", [record(**GPU, **SETTINGS)]), plots=False)
    words = "cuDNN 91501, TF32: convolutions, allocator native; PYTORCH"
    assert f"- settings: {words}" in (report / "summary.md").read_text().replace("\\", "")
    page = (report / "index.html").read_text()
    assert "cuDNN 91501" in page
    assert "power limit 700 W" in page
    report = build(write(tmp_path / "cpu", [record()]), plots=False)
    assert "settings:" not in (report / "summary.md").read_text()
    assert "cuDNN" not in (report / "index.html").read_text()


def test_math_that_nobody_asked_for_is_marked(tmp_path: Path) -> None:
    kernels = {"dense": "math", "chunked": "flash", "longformer": "efficient, math", "overlapping": None}
    found = [record(variant=v, cell_id=v, attention_kernels=k, **GPU) for v, k in kernels.items()]
    asked = record(cell_id="asked", impl="math", attention_kernels="math", **GPU)
    report = build(write(tmp_path / "demo", [*found, asked]), plots=False)
    summary = pd.read_csv(report / "summary.csv").set_index("label")
    assert {*summary.index[summary.unasked_math]} == {"dense (impl=sdpa)", "longformer"}
    text = (report / "summary.md").read_text()
    rows = {row["variant"]: row for row in table(text, "## Cost")}
    assert {name for name, row in rows.items() if row["step time"].endswith(MATH)} == {
        "dense (impl=sdpa)",
        "longformer",
    }
    assert rows["longformer"]["kernels"] == "efficient, math"
    assert f"{MATH} torch took the attention backend math" in text
