"""Cells that measure decoding, by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from commands import bench
from test_model_options import spec_of

from bench.measure import decoding
from bench.measure.decoding_gate import decoding_error
from bench.measure.gate_failed import GateFailed
from bench.records import load
from bench.scenarios.decoding import room
from variants.base import Dims
from variants.ops.key_cache import KeyCache

SMALL = ["data=stdlib", "measure=decode", "seq_len=40", "depth=2", "model.d_model=32", "device=cpu"]
SMALL += ["batch_size=2"]
SHORT = ["measure.decode_tokens=6", "measure.decode_block=4", "measure.time_seconds=0"]


def run(folder: Path, *overrides: str) -> pd.DataFrame:
    done = bench("-m", *SMALL, *SHORT, f"results_dir={folder}", "name=x", *overrides)
    assert done.returncode == 0, done.stderr
    return load(folder / "x").set_index("variant")


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    names = "variant=dense,longformer,performer,linformer"
    knobs = ["longformer.window=16", "linformer.k=8", "measure.budget=4MiB"]
    return run(tmp_path_factory.mktemp("cells"), names, *knobs)


def test_a_cell_measures_a_prompt_and_tokens(cells: pd.DataFrame) -> None:
    dense = cells.loc["dense"]
    longest = 40 + room(spec_of(*SMALL, *SHORT))
    assert dense["decode_state_bytes"] == 2 * 2 * 2 * longest * 32 * 4  # keys and values, layers, sequences
    assert dense["decode_max_abs"] <= 1e-6
    assert dense["peak_bytes_per_second"] > 1e6, "with which the report compares the bytes that a token moves"
    assert len(dense["decode_seconds_samples"]) == 6
    assert dense["decode_seconds_p95"] >= dense["decode_seconds_median"] > 0
    assert dense["decode_block_seconds_median"] > 0
    assert dense["prefill_seconds_median"] > 0
    assert dense["decode_source"] == "measured"
    assert pd.isna(dense["step_seconds_median"]), "no training step was asked for"
    assert cells.loc["longformer", "decode_state_bytes"] == 2 * 2 * 2 * 15 * 32 * 4  # a window of 16


def test_what_cannot_be_decoded_states_its_reason(cells: pd.DataFrame) -> None:
    linformer = cells.loc["linformer"]
    assert linformer["status"] == "unsupported"
    assert linformer["reason"] == "a model that reads later tokens cannot be decoded"


def test_the_largest_batch_fits_and_is_measured(cells: pd.DataFrame) -> None:
    for name, knobs in (("dense", []), ("longformer", ["variant.window=16"]), ("performer", [])):
        cell = cells.loc[name]
        assert cell["decode_batch_size"] == cell["decode_largest_batch"] > 2
        assert cell["decode_batch_seconds_median"] > 0
        batch = f"batch_size={int(cell['decode_largest_batch'])}"
        spec = spec_of(*SMALL, *SHORT, f"variant={name}", *knobs, batch)
        fits = decoding.predicted(spec, room=room(spec))
        assert fits.decode_peak_bytes <= 4 * 2**20 * 0.95


SEGMENTS = ["seq_len=75", "variant.segment=8", "variant.mem_len=8"]
"""Nine and a part: a prediction leaves out those that repeat the cost of one before."""


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        *((name, []) for name in ("dense", "longformer", "sparse_fixed", "performer", "reformer")),
        ("overlapping", []),
        ("chunked", ["variant.chunk=8"]),
        ("transformer_xl", SEGMENTS),
        ("compressive", [*SEGMENTS, "variant.comp_len=4"]),
    ],
)
def test_a_prediction_is_what_is_measured(name: str, knobs: list[str]) -> None:
    """On shapes alone: states, peaks, launches and bytes."""
    spec = spec_of(*SMALL, *SHORT, f"variant={name}", *knobs)
    measured = decoding.Decoding(spec, torch.device("cpu"), room=room(spec)).figures
    assert decoding.predicted(spec, room=room(spec)) == measured


@pytest.mark.slow
def test_a_plan_predicts_decoding_at_any_length(tmp_path: Path) -> None:
    options = ["measure.execute=false", "seq_len=65536", "batch_size=1", "variant=dense,transformer_xl"]
    cells = run(tmp_path, *options)
    assert set(cells["decode_source"]) == {"predicted"}
    growth = cells["decode_bytes_moved"]
    assert growth["dense"] > 20 * growth["transformer_xl"]
    state = cells.loc["dense", "decode_state_bytes"]
    assert state <= growth["dense"] <= 1.3 * (state + cells.loc["dense", "decode_weight_bytes"])


@pytest.mark.slow
def test_the_next_token_costs_the_same_wherever_the_state_is_fixed() -> None:
    for name in ("longformer", "performer", "transformer_xl", "dense"):
        near, far = (
            decoding.predicted(spec_of(*SMALL, *SHORT, f"variant={name}", f"seq_len={length}"), room=31)
            for length in (16_384, 65_536)  # the scores of fewer keys are allocated
        )
        assert far.launches == near.launches
        if name == "dense":
            assert far.bytes_moved - near.bytes_moved == 2 * 2 * 2 * (65_536 - 16_384) * 32 * 4
            held = far.state_bytes - near.state_bytes
            assert far.decode_peak_bytes - near.decode_peak_bytes == held, (
                "a step allocates nothing that grows"
            )
        else:
            assert (far.bytes_moved, far.state_bytes) == (near.bytes_moved, near.state_bytes)
            assert far.decode_peak_bytes == near.decode_peak_bytes


def test_the_gate_sees_a_cache_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(*SMALL, "variant=longformer", "variant.window=8")
    dims = Dims(seq_len=100, d_model=32, heads=2)
    assert decoding_error(spec, dims, 2, torch.device("cpu")) < 1e-6
    write: Any = KeyCache.write
    monkeypatch.setattr(KeyCache, "write", lambda self, k, v: write(self, k.roll(1, 2), v))
    with pytest.raises(GateFailed, match="decoding gate: steps changed a logit by"):
        decoding_error(spec, dims, 2, torch.device("cpu"))


def test_nothing_to_measure_is_one_line() -> None:
    done = bench(*SMALL, "measure.decode_tokens=0")
    assert done.returncode == 2
    assert "measure.step=false: allowed is true: nothing else is measured" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
