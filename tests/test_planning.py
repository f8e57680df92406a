"""Predictions for any size, and the largest size that fits into a memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from tiers import slow

from bench.config.parse import parse
from bench.config.spec import CellSpec
from bench.inputs.errors import ConfigError
from bench.inputs.sizes import parse_bytes
from bench.measure import predict
from bench.measure.predict import Prediction
from bench.measure.step import on_host
from bench.report.sections.budgets import data as budgets

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MIB = 2**20


def spec_of(*overrides: str) -> CellSpec:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=["measure=plan", *overrides])).spec


# --- the search ----------------------------------------------------------------------------------


def best(peak: Any, budget: int, most: int) -> int:
    """The largest that fits, one by one."""
    return max((n for n in range(1, most + 1) if peak(n) <= budget), default=0)


@given(
    fixed=st.integers(0, 10**6),
    slope=st.integers(1, 10**4),
    step=st.sampled_from([1, 7, 64]),
    power=st.sampled_from([1.0, 1.5, 2.0]),
    floor=st.integers(0, 10**6),
    budget=st.integers(1, 10**7),
)
def test_the_largest_is_found_to_within_a_hundredth(
    fixed: int, slope: int, step: int, power: float, floor: int, budget: int
) -> None:
    """Affine, in steps, growing faster, or flat at first; and never one that does not fit."""
    calls = []

    def peak(n: int) -> int:
        calls.append(n)
        return max(floor, fixed + int(slope * (-(-n // step) * step) ** power))

    got = predict.largest(peak, budget, 3000)
    searched = len(calls)
    want = best(peak, budget, 3000)
    assert want / 1.01 - 1 <= got <= want
    assert searched <= 30


@given(fixed=st.integers(0, 10**9), slope=st.integers(1, 10**6), budget=st.integers(1, 10**11))
def test_an_affine_peak_takes_few_predictions(fixed: int, slope: int, budget: int) -> None:
    calls = []

    def peak(n: int) -> int:
        calls.append(n)
        return fixed + slope * n

    predict.largest(peak, budget, 2**14)
    assert len(calls) <= 6
    assert len(set(calls)) == len(calls)


def test_the_ends_of_the_search() -> None:
    assert predict.largest(lambda n: n, 0, 10) == 0
    assert predict.largest(lambda n: 1, 1, 10) == 10
    assert predict.largest(lambda n: 1, 1, 1) == 1
    assert predict.largest(lambda n: n, 1, 10) == 1


# --- what fits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["longformer", *slow("dense", "transformer_xl")],
)
def test_what_is_said_to_fit_fits_and_one_more_does_not(name: str) -> None:
    plan = Prediction(spec_of(f"variant={name}", "depth=2", "activations=checkpoint", "seq_len=512"))
    budget = 96 * MIB

    def peak(**changed: int) -> int:
        return plan.predict(**changed).peak_bytes

    longest = plan.longest_seq_len(budget)
    assert longest % predict.TOKENS == 0
    assert peak(seq_len=longest) <= budget
    more = max(longest + predict.TOKENS, int(longest * 1.02))
    assert longest == predict.MAX_TOKENS or peak(seq_len=more) > budget
    batch = plan.largest_batch_size(budget)
    assert peak(batch_size=batch) <= budget < peak(batch_size=batch + 1)


@pytest.mark.parametrize(
    ("variant", "data"),
    [("dense", "mqar"), ("linformer", "listops"), *slow(("dense", "needle"), ("longformer", "stdlib"))],
)
def test_the_planned_peak_is_the_measured_one_for_every_task(variant: str, data: str) -> None:
    """Also where a task's batch knows more than a training step reads."""
    spec = spec_of(f"variant={variant}", f"data={data}", "model=tiny", "batch_size=3", "seq_len=256")
    make_task, config, setting = spec.task()
    task = make_task(config, setting)
    assert task.unsupported() is None
    _, figures = on_host(lambda: predict.subject(spec, lambda: task.train_batch(0, 0.0), predict.CPU))
    assert Prediction(spec).predict().peaks == figures.peaks


def test_nothing_fits_into_nothing() -> None:
    plan = Prediction(spec_of("variant=dense"))
    assert plan.longest_seq_len(1000) == 0
    assert plan.largest_batch_size(1000) == 0


def test_the_report_knows_where_searches_end() -> None:
    assert (budgets.LONGEST, budgets.LARGEST) == (predict.MAX_TOKENS, predict.MAX_SEQUENCES)


# --- sizes in memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("80GiB", 80 * 2**30),
        ("80 GiB", 80 * 2**30),
        ("80gib", 80 * 2**30),
        ("80GB", 80 * 10**9),
        ("8e10", 8 * 10**10),
        (8e10, 8 * 10**10),
        ("512B", 512),
        (2**20, 2**20),
        ("1.5MiB", 3 * 2**19),
        ("24564MiB", 24564 * 2**20),
    ],
)
def test_a_budget_in_any_common_spelling(said: object, size: int) -> None:
    assert parse_bytes("measure.budget", said) == size


@pytest.mark.parametrize(
    "said", ["", "lots", "80 GiBs", "-1GiB", "0", "1e400", "GiB", True, "1.2.3GB", "nan"]
)
def test_nonsense_is_refused_with_examples(said: object) -> None:
    with pytest.raises(ConfigError, match="80GiB, 80GB, 512MiB or 8e10") as refusal:
        parse_bytes("measure.budget", said)
    assert f"measure.budget={said}" in str(refusal.value)


def test_a_small_number_needs_a_unit() -> None:
    with pytest.raises(ConfigError, match="did you mean 24GiB or 24B"):
        spec_of("batch_size=fit", "measure.budget=24")


def test_a_batch_that_fits_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match=r"needs measure\.budget"):
        spec_of("batch_size=fit")
    assert spec_of("batch_size=fit", "measure.budget=1GiB").batch_size == 0
    for wrong in ("0", "-1", "1.5", "fits", "true"):
        with pytest.raises(ConfigError, match="batch_size="):
            spec_of(f"batch_size={wrong}")


def test_a_plan_for_an_accelerator_cuts_work_as_it_would() -> None:
    """Larger pieces hold more at a time; dense attention has none."""

    def peak(name: str, device: str) -> int:
        spec = spec_of(f"variant={name}", "model.heads=16", "seq_len=4096", "depth=1", f"device={device}")
        return Prediction(spec).predict().peak_bytes

    assert peak("reformer", "cuda") > peak("reformer", "cpu")
    assert peak("dense", "cuda") == peak("dense", "cpu")
