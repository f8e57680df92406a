"""The report's section on decoding, from records that measured it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_parts import part_of
from test_report import record, write

from bench.report import build


def cell(variant: str, seq_len: int, replicate: int, token: float, **figures: Any) -> dict[str, Any]:
    """A record of a cell that measured decoding only."""
    nothing = dict.fromkeys(
        ("step_seconds_median", "forward_seconds_median", "peak_bytes_predicted", "peak_bytes")
    )
    nothing |= dict.fromkeys(
        ("flops_executed_step", "flops_algorithmic_step", "tokens_per_second", "nll", "params")
    )
    decoded = {
        "decode_source": "measured",
        "decode_state_bytes": 1024 * seq_len if variant == "dense" else 4096,
        "decode_weight_bytes": 1000,
        "decode_seconds_median": token,
        "decode_seconds_p95": 2 * token,
        "decode_block": 8,
        "decode_block_seconds_median": 4 * token,
        "prefill_seconds_median": 100 * token,
        "decode_launches": 50,
        "decode_bytes_moved": 5000,
        "peak_bytes_per_second": 1e7,
        "decode_peak_bytes": 9000,
        "prefill_peak_bytes": 90_000,
        "decode_batch_size": 10,
        "decode_largest_batch": 10,
        "decode_batch_seconds_median": 5 * token,
        "budget_bytes": 2**30,
    }
    identity = {"cell_id": f"{variant}{seq_len}-{replicate}", "variant": variant, "seq_len": seq_len}
    return record(**identity, replicate=replicate, **{**nothing, **decoded, **figures})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense grows with the length, the window does not; the second replicate ran on a slower machine."""
    found = [
        cell(variant, length, replicate, (1 + replicate) * token)
        for replicate in (0, 1)
        for length in (512, 2048, 8192)
        for variant, token in (("dense", length * 1e-6), ("longformer", 0.002))
    ]
    folder = write(tmp_path_factory.mktemp("decoding") / "x", found)
    build(folder, plots=True)
    return folder


def test_ratios_are_taken_within_a_replicate(folder: Path) -> None:
    cells = pd.read_csv(folder / "report" / "decoding.csv").set_index(["label", "seq_len"])
    assert cells.loc[("longformer", 8192), "token_ratio"] == pytest.approx(2000 / 8192)
    assert cells.loc[("longformer", 512), "decode_seconds_median"] == pytest.approx(0.003)
    assert cells.loc[("longformer", 512), "decode_token_of_block"] == pytest.approx(0.0015)
    assert cells.loc[("dense", 512), "decode_batch_rate"] == pytest.approx((10 / 0.00256 + 10 / 0.00512) / 2)
    assert cells.loc[("longformer", 2048), "state_ratio"] == pytest.approx(4096 / (1024 * 2048))
    assert (cells["replicates"] == 2).all()
    assert cells.loc[("longformer", 512), "bandwidth_share"] == pytest.approx(5000 / 1e7 / 0.003)


def test_the_context_from_which_a_token_is_cheaper(folder: Path) -> None:
    text = (folder / "report" / "summary.md").read_text()
    own = text[text.index("## Decoding") :]
    line = next(line for line in own.splitlines() if "from 2,000 on" in line or "from 2000 on" in line)
    assert line.lstrip("| ").startswith("longformer")
    assert line.rstrip("| ").endswith("1.00×")


def test_the_figures_are_drawn_and_no_table_of_steps_is_empty(folder: Path) -> None:
    plots = {path.stem for path in (folder / "report" / "plots").glob("*.svg")}
    assert {"decoding", "decoding_batch"} <= plots
    text = (folder / "report" / "summary.md").read_text()
    assert "\n## Cost\n" not in text, "no training step was measured"
    assert "\n## What fits\n" not in text, "a budget of decoding is no search for what fits"


def test_disturbed_times_are_marked(tmp_path: Path) -> None:
    found = [cell("dense", 512, 0, 0.001), cell("longformer", 512, 0, 0.002, contaminated="other load")]
    text = part_of(tmp_path / "x", found, "decoding").text
    assert "2.00 ms§" in text
    own = text[text.index("## Decoding") :]
    assert "§" not in next(line for line in own.splitlines() if line.startswith("| dense"))


@pytest.mark.slow
def test_a_trained_model_without_costs_of_steps_has_a_report(tmp_path: Path) -> None:
    """Training and decoding with measure.step=false."""
    found = [cell(name, 512, 0, 0.001, nll=1.0) for name in ("dense", "longformer")]
    text = (build(write(tmp_path / "x", found)) / "summary.md").read_text()
    assert "## Quality" in text
    assert "### Cost of a training step" not in text
    assert "## Decoding" in text


def test_a_report_without_decoding_has_no_section(tmp_path: Path) -> None:
    text = part_of(tmp_path / "x", [record()], "decoding").text
    assert "## Decoding" not in text


def combined(variant: str, layer: str, replicate: int, token: float, **knobs: Any) -> Any:
    own = {"feed_forward": layer, "feed_forward_params": {"mult": 4, **knobs}}
    one: Any = cell(variant, 512, replicate, (1 + replicate) * token, **own)
    return replace(one, cell_id=f"{variant}{layer}{len(knobs)}-{replicate}")


@pytest.fixture(scope="module")
def of_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four combinations of layers; the second replicate ran on a slower machine."""
    found = [
        one
        for replicate in (0, 1)
        for one in (
            combined("dense", "mlp", replicate, 0.006),
            combined("dense", "mlp", replicate, 0.008, mult=6),
            combined("dense", "sparse", replicate, 0.003),
            combined("sparse_qkv", "mlp", replicate, 0.004, mult=6),
            combined("sparse_qkv", "sparse", replicate, 0.0024, mult=6),
        )
    ]
    folder = write(tmp_path_factory.mktemp("layers") / "x", found)
    build(folder, plots=False)
    return folder


def test_a_table_has_the_speed_up_of_combined_layers(of_layers: Path) -> None:
    text = (of_layers / "report" / "summary.md").read_text()
    own = text[text.index("Combined layers: ") :]
    lines = [line for line in own[: own.index("\n\n", own.index("|"))].splitlines() if line.startswith("|")]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert rows[0][:5] == ["variant", "feed-forward", "context", "time a token", "speed-up"]
    assert [row[:2] + row[3:5] for row in rows[2:]] == [
        ["dense", "mlp (mult=4)", "9.00 ms", "1.00×"],
        ["dense", "mlp (mult=6)", "12.0 ms", "0.750×"],
        ["dense", "sparse (mult=4)", "4.50 ms", "2.00×"],
        ["sparse_qkv", "mlp (mult=6)", "6.00 ms", "1.50×"],
        ["sparse_qkv", "sparse (mult=6)", "3.60 ms", "2.50×"],
    ]
    cells = pd.read_csv(of_layers / "report" / "decoding.csv").set_index(["variant", "feed_forward_layer"])
    assert cells.loc[("sparse_qkv", "sparse (mult=6)"), "speedup"] == pytest.approx(2.5)


def test_speed_ups_are_relative_to_the_usual_layers_only(tmp_path: Path) -> None:
    """Without dense attention and the default knobs there is no table."""
    found = [combined("dense", "mlp", 0, 0.006, mult=6), combined("dense", "sparse", 0, 0.003)]
    text = part_of(tmp_path / "x", found, "decoding").text
    assert "Combined layers" not in text
    assert "## Decoding" in text


def test_variants_with_equal_slots_are_no_combinations(folder: Path) -> None:
    assert "Combined layers" not in (folder / "report" / "summary.md").read_text()
