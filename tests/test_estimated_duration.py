"""The estimated duration of a sweep: what a cell does, how often, and what the presets for GPUs take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hydra_sweeps import swept

from bench.config.spec import Cell
from bench.measure import timing
from bench.measure.estimate import CARDS, estimated_seconds
from bench.measure.step import StepFigures
from bench.run import estimated_duration as duration
from bench.run.prepare import order_in_rounds

H100 = CARDS["h100"]
MINUTE = 60.0
FIGURES = StepFigures(
    flops_forward=1,
    flops_step=1,
    launches_step=1000,
    bytes_moved_step=1,
    param_bytes=1,
    grad_bytes=1,
    optimizer_bytes=1,
    activation_bytes=1,
    peaks={"forward": {"x": 5}, "backward": {}, "optimizer": {}},
)
PLANNED = duration.Planned(FIGURES)
STEP = H100.seconds_per_step + 1000 * H100.seconds_per_launch
TRAINED = ("measure=standard", "measure.train_tokens=40960", "measure.eval_tokens=1024", "batch_size=4")


def cells_of(*overrides: str) -> list[Cell]:
    return swept("device=cuda", "dtype=bfloat16", "seq_len=1024", *overrides)


def test_a_cell_is_its_start_its_gates_and_its_steps() -> None:
    (cell,) = cells_of("measure=quick", "measure.time_seconds=0")
    seconds = duration.cell_seconds(cell.spec, PLANNED, H100, is_gated=False)
    assert (seconds.start, seconds.gates) == (duration.START_SECONDS, duration.GATE_SECONDS)
    assert seconds.training == seconds.evaluation == 0
    runs = timing.ACCELERATOR_WARM_UP + timing.ACCELERATOR_SAMPLES
    steps = runs + duration.COUNTED_STEPS + duration.STEPS + runs * duration.FORWARD_SHARE
    counted = duration.COUNTED_STEPS * 1000 * duration.COUNTED_LAUNCH_SECONDS
    assert seconds.cost == pytest.approx(steps * STEP + counted)
    assert duration.cell_seconds(cell.spec, PLANNED, H100, is_gated=True).gates == 0
    assert duration.cell_seconds(cell.spec, None, H100, is_gated=False).total == duration.START_SECONDS


def test_samples_take_the_time_that_they_are_given() -> None:
    short, long = (cells_of("measure=quick", f"measure.time_seconds={s}")[0].spec for s in (0, 2))
    more = [duration.cell_seconds(spec, PLANNED, H100, is_gated=True).cost for spec in (short, long)]
    assert 2 < more[1] - more[0] + 13 * STEP * (1 + duration.FORWARD_SHARE) < 2 * (2 + 5 * STEP)


def test_training_is_as_many_steps_as_the_budget_has() -> None:
    (cell,) = cells_of(*TRAINED)
    seconds = duration.cell_seconds(cell.spec, PLANNED, H100, is_gated=True)
    assert seconds.training == pytest.approx(10 * STEP)
    (timed,) = cells_of(*TRAINED, "measure.train_budget=seconds", "measure.train_seconds=77")
    assert duration.cell_seconds(timed.spec, PLANNED, H100, is_gated=True).training == 77
    (flops,) = cells_of(*TRAINED, "measure.train_budget=flops", "measure.train_flops=1e15")
    assert duration.cell_seconds(flops.spec, PLANNED, H100, is_gated=True).training > 100 * STEP


def test_branches_of_budgets_and_a_search_are_counted() -> None:
    """80 steps with branches of 4 and 8 steps for 20 and 40; a search is three trainings of 20, or of the
    whole, once for all replicates."""
    trained = (*TRAINED, "measure.train_tokens=327680", "measure.schedule=wsd", "measure.train_budgets=3")
    searched = (*trained, "measure.learning_rate=search", "replicate=0,1")
    specs = [cell.spec for cell in (*cells_of(*trained), *cells_of(*searched))]
    found = [duration.cell_seconds(spec, PLANNED, H100, is_gated=True).training for spec in specs]
    assert found == pytest.approx([92 * STEP, 152 * STEP, 92 * STEP])
    (first, _) = cells_of(*searched, "measure.search_budget=largest")
    whole = duration.cell_seconds(first.spec, PLANNED, H100, is_gated=True).training
    assert whole == pytest.approx((1 + 3) * 92 * STEP)


def test_a_model_with_state_is_evaluated_twice() -> None:
    dense, recurrent = (cells_of(*TRAINED, f"variant={name}")[0].spec for name in ("dense", "transformer_xl"))
    once, twice = (
        duration.cell_seconds(spec, PLANNED, H100, is_gated=True).evaluation for spec in (dense, recurrent)
    )
    assert twice - once == pytest.approx(duration.FORWARD_SHARE * STEP)


def test_longer_sequences_are_forward_passes_of_their_tokens() -> None:
    """2,048 targets are 8 groups at 1,024 tokens; each is read at 1, 2, 4 and 8 times this length."""
    plain, longer = (cells_of(*TRAINED, "seq_len=1024", f"measure.longer={n}")[0].spec for n in (0, 8))
    without, with_them = (
        duration.cell_seconds(spec, PLANNED, H100, is_gated=True).evaluation for spec in (plain, longer)
    )
    forwards = 8 * 15 * 1024 / (4 * 1024)
    assert with_them - without == pytest.approx(forwards * duration.FORWARD_SHARE * STEP)


def test_rounds_add_up_and_gates_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "plan", lambda spec: PLANNED)
    cells = cells_of("measure=quick", "replicate=0,1", "seq_len=1024,2048", "report_minutes=60")
    found = duration.estimate(cells, H100)
    assert [count for count, _ in found.rounds.values()] == [2, 2]
    assert found.total.gates == duration.GATE_SECONDS
    assert found.total.reports == 2 * duration.REPORT_SECONDS
    assert found.total.total == pytest.approx(sum(seconds.total for _, seconds in found.rounds.values()))
    assert found.first_table is None, "nothing is trained"
    assert found.peak_bytes == 5


def test_the_first_table_comes_with_the_first_report_after_a_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duration, "plan", lambda spec: PLANNED)
    cells = cells_of(*TRAINED, "variant=dense,chunked,longformer", "report_minutes=60")
    found = duration.estimate(cells, H100)
    assert found.first_table == (pytest.approx(found.total.total), 3)
    often = duration.estimate([replace(cell, report_minutes=0.01) for cell in cells], H100)
    assert often.first_table is not None
    assert often.first_table[1] == 1
    assert often.trained == 3
    assert duration.estimate([replace(cell, report_minutes=None) for cell in cells], H100).first_table is None


def test_what_cannot_be_planned_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = cells_of("measure=quick", "variant=dense,longformer", "variant.impl=flex")
    text = duration.text(cells, "h100")
    assert "Not planned here" in text
    assert text.count("longformer T=1024") == 1


def test_a_plan_is_that_of_the_cell() -> None:
    (cell,) = cells_of("measure=quick", "model.d_model=64", "depth=1")
    planned = duration.plan(cell.spec)
    assert planned is not None
    assert planned.token is None
    figures = planned.step
    step = estimated_seconds(figures.launches_step, figures.bytes_moved_step, figures.flops_step, H100)
    host = H100.seconds_per_step + figures.launches_step * H100.seconds_per_launch
    assert step == pytest.approx(host), "a small step is the host's"


def test_decoding_is_prompts_tokens_and_a_batch_without_training_steps() -> None:
    small = ("measure=decode", "model.d_model=64", "depth=1", "measure.time_seconds=0")
    plain, budgeted = (
        cells_of(*small, *more)[0].spec for more in ((), ("measure.budget=64GiB", "measure.reserve=0"))
    )
    planned = duration.plan(plain)
    assert planned is not None
    assert planned.token is not None
    assert planned.peak_bytes(plain.measure) < planned.step.peak_bytes
    step = estimated_seconds(
        planned.step.launches_step, planned.step.bytes_moved_step, planned.step.flops_step, H100
    )
    found = duration.cell_seconds(plain, planned, H100, is_gated=True)
    assert found.cost == found.training == 0
    prompts = 1 + timing.ACCELERATOR_WARM_UP + timing.ACCELERATOR_SAMPLES
    tokens = 3 + 64 + 9 * plain.measure.decode_block
    one = planned.token.launches * H100.seconds_per_launch
    assert found.decoding == pytest.approx(prompts * step / 3 + tokens * one)
    with_batch = duration.cell_seconds(budgeted, planned, H100, is_gated=True).decoding
    reading = 64 * 2**30 / H100.bytes_per_second
    assert with_batch - found.decoding == pytest.approx(step / 3 + (3 + 8) * reading)


def test_what_cannot_be_decoded_takes_no_time() -> None:
    (cell,) = cells_of("measure=decode", "variant=linformer", "variant.k=16", "model.d_model=64", "depth=1")
    planned = duration.plan(cell.spec)
    assert planned is not None
    assert planned.token is None
    assert duration.cell_seconds(cell.spec, planned, H100, is_gated=True).decoding == 0


# --- the presets for GPUs ---------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["gpu", "gpu_long"])
def test_a_preset_trains_each_variant_first_and_long_enough(preset: str) -> None:
    cells = order_in_rounds(swept(f"experiment={preset}"))
    trained = [cell.spec for cell in cells if cell.spec.measure.train_amount]
    variants_of = {spec.variant for spec in trained}
    assert {cell.spec.variant for cell in cells} == variants_of
    assert len(variants_of) == 12
    for spec in trained:
        steps = spec.measure.train_tokens / (spec.batch_size * spec.seq_len)
        assert steps >= 3000
        assert spec.batch_size > 1
    for replicate in (0, 1):
        here = [cell.spec for cell in cells if cell.spec.replicate == replicate]
        assert {spec.variant for spec in here[:12]} == variants_of
        assert all(spec.measure.train_amount for spec in here[:12])
    for cell in cells:
        params = cell.spec.variant_params
        assert params.get("segments_at_once", "all") == "all"
        assert cell.report_minutes is not None


def test_a_step_has_as_many_tokens_at_every_length() -> None:
    cells = swept("experiment=gpu")
    costs = [cell.spec for cell in cells if not cell.spec.measure.train_amount]
    assert {spec.batch_size * spec.seq_len for spec in costs} == {65_536}
    assert {spec.seq_len for spec in costs} == {2**k for k in range(10, 17)}
    assert {spec.activations for spec in costs if spec.depth == 4} == {"keep"}
    assert any(spec.twin for spec in costs)


@pytest.mark.slow
def test_the_preset_takes_an_hour_and_shows_perplexities_in_ten_minutes() -> None:
    """By the estimate: counts and constants, no measured time."""
    found = duration.estimate(swept("experiment=gpu"), H100)
    assert not found.unplanned
    assert found.total.total <= 60 * MINUTE
    assert found.first_table is not None
    seconds, trained = found.first_table
    assert seconds <= 10 * MINUTE
    assert trained >= found.trained // 2
    assert found.peak_bytes < 60 * 2**30


@pytest.mark.slow
def test_the_long_preset_takes_a_night() -> None:
    found = duration.estimate(swept("experiment=gpu_long"), H100)
    assert not found.unplanned
    assert found.total.total <= 10 * 60 * MINUTE
