"""Growth: known exponents are found, claims are held against them, and every variant's plan against both."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from report_parts import part_of
from test_report import record, table
from test_report_memory import frame_of

import variants
from bench.config.parse import parse
from bench.records import Record
from bench.report.data.power_law import FEWEST, SPAN, TOLERANCE, Fit, fit, verdict
from bench.report.data.statistics import cost_cells
from bench.report.sections.growth.data import exponents
from bench.run.cell import CellRun

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LENGTHS = (512, 1024, 2048, 4096)


# --- fits -----------------------------------------------------------------------------------------


@given(
    exponent=st.floats(-1, 3),
    scale=st.floats(1e-9, 1e9),
    first=st.integers(1, 2000),
    points=st.integers(3, 6),
)
def test_a_power_law_gives_its_exponent(exponent: float, scale: float, first: int, points: int) -> None:
    sizes = [float(first * 2**k) for k in range(points)]
    found = fit(sizes, [scale * size**exponent for size in sizes])
    assert found is not None
    assert found.exponent == pytest.approx(exponent, abs=1e-6)
    assert found.low == pytest.approx(exponent, abs=1e-5)
    assert found.high == pytest.approx(exponent, abs=1e-5)
    assert found.last == sizes[-1]
    assert found.first >= min(found.last / SPAN, sizes[-FEWEST])


def test_an_interval_holds_the_exponent_as_often_as_it_says() -> None:
    """Noise of a tenth on four lengths: of 1,000 intervals some 95 % hold the truth."""
    noise = np.random.default_rng(0).normal(0, 0.1, (1000, len(LENGTHS)))
    held = 0
    for row in noise:
        found = fit(LENGTHS, [size**1.5 * math.exp(e) for size, e in zip(LENGTHS, row, strict=True)])
        assert found is not None
        held += found.low <= 1.5 <= found.high
    assert 930 <= held <= 970


def test_a_fixed_cost_bends_the_line_and_the_longest_lengths_count() -> None:
    sizes = [2.0**k for k in range(8, 17)]
    found = fit(sizes, [1e6 + size**2 for size in sizes])
    assert found is not None
    assert (found.first, found.last, found.points) == (2**13, 2**16, 4)
    assert found.exponent == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("sizes", [[512, 1024], [512, 512, 1024], []])
def test_two_sizes_are_no_fit(sizes: list[float]) -> None:
    assert fit(sizes, [1.0] * len(sizes)) is None


def test_sizes_far_apart_are_fitted_all_the_same() -> None:
    found = fit([1, 100, 10_000, 1_000_000], [1, 1, 100, 10_000])
    assert found is not None
    assert (found.points, found.first) == (FEWEST, 100)


def test_figures_that_were_not_taken_are_no_points() -> None:
    assert fit(LENGTHS, [1.0, math.nan, 2.0, math.nan]) is None
    found = fit([*LENGTHS, 8192], [math.nan, *(float(size) for size in LENGTHS[1:]), math.nan])
    assert found is not None
    assert (found.first, found.last, found.points) == (1024, 4096, 3)


@pytest.mark.parametrize(
    ("low", "high", "claim", "want"),
    [
        (1.2, 1.3, 1.0, "above"),
        (1.0 + 0.9 * TOLERANCE, 1.3, 1.0, ""),
        (0.5, 0.85, 1.0, "below"),
        (0.5, 1.0, 1.0, ""),
        (0.0, 3.0, 1.0, ""),
        (1.2, 1.3, math.nan, ""),
    ],
)
def test_a_claim_is_contradicted_by_the_whole_interval(
    low: float, high: float, claim: float, want: str
) -> None:
    assert verdict(Fit((low + high) / 2, low, high, 4, 512, 4096), claim) == want


# --- the table ------------------------------------------------------------------------------------


def growing(variant: str, seq_len: int, depth: int = 2, replicate: int = 0, **other: Any) -> Record:
    """Time as T^1.5, memory as T, FLOPs by formula; all in proportion to depth, what is saved as its root."""
    claims = {"dense": (2, 2, None), "longformer": (1, 1, 1), "transformer_xl": (1, 0, 2)}
    time, memory, survey = claims[variant]
    attention = depth * seq_len ** (2 if variant == "dense" else 1) * 1000
    values: dict[str, Any] = {
        "cell_id": f"{variant}-{seq_len}-{depth}-{replicate}-{len(other)}",
        "step_seconds_median": 1e-6 * depth * seq_len**1.5 * (1 + 0.001 * replicate),
        "peak_bytes": 1000 * depth * seq_len,
        "activation_bytes": round(1e6 * depth**0.5) * seq_len,
        "flops_attention_step": attention,
        "flops_algorithmic_step": attention + depth * seq_len,
        "flops_executed_step": 2 * attention,
        "claimed_time_exponent": time,
        "claimed_memory_exponent": memory,
        "claimed_depth_exponent": 0.5,
        "claim_source": f"T^{time} (Author 2020, §1)",
        "survey_exponent": survey,
    }
    return record(variant, seq_len, depth, replicate, **{**values, **other})


def grown(*depths: int) -> list[Record]:
    return [
        growing(variant, seq_len, depth, replicate)
        for variant in ("dense", "longformer", "transformer_xl")
        for seq_len in LENGTHS
        for depth in depths or (2,)
        for replicate in (0, 1)
    ]


@pytest.mark.slow
def test_exponents_stand_beside_the_claims_they_contradict(tmp_path: Path) -> None:
    text = part_of(tmp_path, grown(), "growth").text
    rows = {row["variant"]: row for row in table(text, "### In the length: clm, depth 2")}
    assert list(rows) == ["dense", "longformer", "transformer_xl"]
    assert {row["lengths"] for row in rows.values()} == {"512–4k"}
    assert {name: row["step time"] for name, row in rows.items()} == {
        "dense": "1.50▽",
        "longformer": "1.50▲",
        "transformer_xl": "1.50▲",
    }
    assert [row["attention FLOPs"] for row in rows.values()] == ["2.00", "1.00", "1.00"]
    assert [row["survey"] for row in rows.values()] == ["–", "1", "2≠"]
    assert [row["peak memory"] for row in rows.values()] == ["1.00▽", "1.00", "1.00▲"]
    assert rows["dense"]["claim"] == "T^2 (Author 2020, §1)"
    for mark in "▲▽≠":
        assert re.search(rf"^- {mark} ", text, re.MULTILINE), f"{mark} is explained"


def test_growth_in_depth_is_held_against_what_the_strategy_claims(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, grown(1, 2, 4))
    found = exponents(cost_cells(frame))
    deep = found[(found["axis"] == "depth") & (found["label"] == "dense") & (found["seq_len"] == 1024)]
    by_figure = deep.set_index("figure")
    assert {str(found[key].dtype) for key in ("depth", "seq_len")} == {"Int64"}, "no depth of 2.0 layers"
    assert by_figure.loc["time", "exponent"] == pytest.approx(1, abs=1e-6)
    assert by_figure.loc["saved", "exponent"] == pytest.approx(0.5, abs=1e-3)
    assert by_figure.loc["saved", "verdict"] == ""
    assert by_figure.loc["saved", "claim"] == 0.5
    wrong = [growing("dense", 512, depth, claimed_depth_exponent=0) for depth in (1, 2, 4)]
    one = exponents(cost_cells(frame_of(tmp_path / "wrong", wrong))).set_index("figure")
    assert one.loc["saved", "verdict"] == "above"


def test_two_lengths_and_depths_make_no_section(tmp_path: Path) -> None:
    found = [r for r in grown(1, 2) if r.seq_len <= 1024]
    assert exponents(cost_cells(frame_of(tmp_path, found))).empty
    assert "## Growth" not in part_of(tmp_path / "report", found, "growth").text


def test_records_without_claims_are_fitted_all_the_same(tmp_path: Path) -> None:
    claims = [k for k in vars(grown()[0]) if k.startswith("claim")] + ["survey_exponent"]
    old = [growing(r.variant, r.seq_len, replicate=r.replicate, **dict.fromkeys(claims)) for r in grown()]
    found = exponents(cost_cells(frame_of(tmp_path, old)))
    assert len(found)
    assert set(found["verdict"]) == {""}
    assert found["claim"].isna().all()
    assert "## Growth" in part_of(tmp_path / "report", old, "growth").text


def test_what_did_not_finish_has_flops_and_no_time(tmp_path: Path) -> None:
    found = grown()
    for one in found:
        if one.seq_len == 4096:
            one.status = "oom"
    fits = exponents(cost_cells(frame_of(tmp_path, found))).query("label == 'dense'").set_index("figure")
    assert fits.loc["time", "last"] == 2048
    assert fits.loc["attention", "last"] == 4096
    text = part_of(tmp_path / "report", found, "growth").text
    row = table(text, "### In the length: clm, depth 2")[0]
    assert "time, memory, saved 512–2k; attention, algorithmic, executed 512–4k" in row["lengths"]


# --- every variant's plan ------------------------------------------------------------------------

LONG = (2**14, 2**16, 2**18)
"""Powers of four, whose roots are powers of two: a stride nearest to √T is exactly √T."""
FLOPS_WITHIN, BYTES_WITHIN = 0.02, 0.1
PADDING_WITHIN = 0.1
"""The share of pairs that are computed and masked may change with the length where a variant says that it
pads; by no more than this, in the exponent."""
BESIDE = {"reformer": "a logarithm, and hashing", "routing": "half of its heads are local"}
"""What parts an attention's formula at these lengths from the power that the paper claims."""
QUICK = ("dense", "transformer_xl", "longformer")


def planned(folder: Path, name: str, *overrides: str) -> pd.DataFrame:
    """What cells of `measure=plan` tell of a variant at long lengths, a row a length."""
    corpus = folder / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    knobs = [f"variant={name}", "depth=1", "model.d_model=64", "model.heads=2", "measure=plan", "device=cpu"]
    knobs += ["data=files", f"data.path={corpus}", f"results_dir={folder}", *overrides]
    rows = []
    for seq_len in LONG:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cell = parse(compose("config", overrides=[*knobs, f"seq_len={seq_len}"]))
        told: dict[str, Any] = {"seq_len": seq_len}
        CellRun(cell, "plan", "code", told.update).run()
        rows.append(told)
    return pd.DataFrame(rows)


def slope(plan: pd.DataFrame, costs: pd.Series[float]) -> float:
    found = fit(list(plan["seq_len"]), list(costs))
    assert found is not None
    return found.exponent


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in variants.mixers()],
)
def test_fitted_exponents_agree_with_the_formulas(tmp_path: Path, name: str) -> None:
    """Of a plan's cells: attention grows by formula as its paper claims, what is dispatched grows as the
    formula, and what is saved for the backward pass as the claim says, or less.

    Of memory a claim is a bound. A step saves T hidden states whatever attention does, unless it goes
    segment by segment; and scores that a claim above 1 counts are not stored where a kernel computes them
    again. The peak itself has parameters in it, which do not grow, and the batch, which does.
    """
    plan, claim = planned(tmp_path, name), variants.load(name).info.complexity
    formula = slope(plan, plan["flops_attention_step"])
    within = 0.15 if name in BESIDE else FLOPS_WITHIN
    assert formula == pytest.approx(claim.time, abs=within)
    dispatched = slope(plan, plan["flops_attention_step"] * plan["cost_ratio"])
    padded = plan["cost_ratio_reason"].notna().any()
    assert dispatched == pytest.approx(formula, abs=PADDING_WITHIN if padded else FLOPS_WITHIN)
    saved = slope(plan, plan["activation_bytes"])
    assert min(claim.memory, 1) - BYTES_WITHIN <= saved <= claim.memory + BYTES_WITHIN


def test_scores_that_are_stored_grow_as_the_square(tmp_path: Path) -> None:
    """The claim of memory itself, where it is done."""
    plan = planned(tmp_path, "dense", "variant.impl=naive")
    assert slope(plan, plan["activation_bytes"]) == pytest.approx(2, abs=BYTES_WITHIN)
    assert slope(plan, plan["peak_bytes"]) == pytest.approx(2, abs=BYTES_WITHIN)
