"""The schedule wsd and its budgets: a smaller budget's branch is the run that has only this budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra_sweeps import swept
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import variants
from bench.config.spec import MeasureSpec
from bench.measure import predict
from bench.model.activations import STRATEGIES
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.scenarios.support import Unsupported, check_supported
from bench.scenarios.training import TrainingRun
from bench.tasks.base import Batch
from bench.train import checkpoints, loop
from bench.train.checkpoints import CheckpointStore
from bench.train.loop import Training, train
from bench.train.rate_search import MAX_FURTHER, search
from bench.train.schedule import DECAY_SHARE, WARM_UP_SHARE, Budget, decay_start
from bench.train.step import StepOut, optimizer_for, training_step
from variants.base import Workload

SIZES = Workload(causal=True, batch_size=2, seq_len=16, d_model=16, heads=2)
VOCABULARY = 17
MEMORY = {"transformer_xl": {"segment": 8, "mem_len": 8}}
MEMORY["compressive"] = {"segment": 8, "mem_len": 8, "comp_len": 4}


def model_of(name: str = "dense", **knobs: Any) -> LanguageModel:
    torch.manual_seed(0)
    variant = variants.load(name)
    return LanguageModel(
        ModelSpec.of(variant, variant.Config.of(knobs), feed_forward=feed_forward(mult=2)),
        SIZES,
        depth=2,
        dropout=0.1,
        vocabulary=VOCABULARY,
        activations="keep",
    )


TEXT = torch.randint(0, VOCABULARY, (2, 40 * SIZES.seq_len + 1), generator=torch.Generator().manual_seed(1))


def batch(step: int, done: float = 0.0) -> Batch:
    """Rows that continue those of the step before."""
    window = TEXT[:, step * SIZES.seq_len : (step + 1) * SIZES.seq_len + 1]
    return Batch(window[:, :-1], window[:, 1:])


def run(
    model: LanguageModel, budget: Budget, batches: Callable[[int, float], Batch] = batch, **changed: Any
) -> Training:
    given_: dict[str, Any] = {"learning_rate": 1e-2, "causal": True, "step_tokens": 32, **changed}
    return train(model, batches, budget=budget, **given_)


def budget_of(steps: int, *smaller: int) -> Budget:
    return Budget(steps=steps, smaller=smaller, is_wsd=True)


@settings(deadline=None)
@given(st.integers(1, 3000))
def test_wsd_rises_stays_and_falls(steps: int) -> None:
    budget = budget_of(steps)
    factors = [budget.wsd_factor(step, steps) for step in range(steps)]
    start, warm = decay_start(steps), math.ceil(WARM_UP_SHARE * steps)
    assert all(0 < factor <= 1 for factor in factors)
    assert all(a < b for a, b in pairwise(factors[: min(warm, start)]))
    assert all(factor == 1 for factor in factors[warm - 1 : start])
    assert all(a > b for a, b in pairwise(factors[start:]))
    assert steps - start == max(1, round(DECAY_SHARE * steps))
    if steps >= 100:
        assert factors[0] == pytest.approx(1 / warm)
        assert factors[-1] < 0.03
        assert factors[start + (steps - start) // 4] == pytest.approx(0.5, abs=0.05), "1 − √(1/4)"


def test_the_budgets_are_halves() -> None:
    measure = MeasureSpec(schedule="wsd", train_budgets=3, train_tokens=100, eval_tokens=1)
    assert Budget.of(measure, step_tokens=7, step_flops=0).all_steps == (4, 8, 15)  # of 25, 50 and 100 tokens
    assert Budget.of(measure, step_tokens=60, step_flops=0).all_steps == (1, 2), "equal ones are one"


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


class OneBudget(Budget):
    """A single budget, whose warm-up is that of 5 steps."""

    def wsd_factor(self, step: int, end: int) -> float:
        return budget_of(10**6, 5).wsd_factor(step, end)


@pytest.mark.parametrize("name", ["dense", "performer", "reformer"])
def test_a_branch_is_the_run_with_its_budget(name: str) -> None:
    """Its weights, to the bit, and what comes after it is as if it had not been: dropout, hashing and random
    features included."""
    knobs: dict[str, Any] = {"reformer": {"chunk": 8}, "performer": {"redraw": 2}}.get(name, {})
    model = model_of(name, **knobs)
    seen: list[dict[str, Any]] = []

    def evaluate() -> float:
        seen.append(deepcopy(model.state_dict()))
        model.eval()
        return float(len(seen))

    training = run(model, budget_of(20, 5, 10), evaluate=evaluate)
    assert training.results == [1.0, 2.0]
    assert training.step == 20
    seen.append(model.state_dict())
    for steps, weights in zip((5, 10, 20), seen, strict=True):
        alone = model_of(name, **knobs)
        run(alone, OneBudget(steps=steps, is_wsd=True))
        assert all(same(weights[key], value) for key, value in alone.state_dict().items())


def test_the_rates_of_a_run_are_those_of_its_trunk() -> None:
    """The curve is that of the largest budget, without the decays of the branches."""
    training = run(model_of(), budget_of(20, 5, 10))
    rates = [row.learning_rate / 1e-2 for row in training.curve.rows]
    assert [row.step for row in training.curve.rows] == list(range(1, 21))
    assert rates[:16] == [1.0] * 16, "a warm-up of a tenth of 5 steps is one step"
    assert rates[16:] == [1 - math.sqrt(k / 4) for k in range(4)]


class Killed(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize(
    ("name", "until"), [*(("dense", until) for until in range(1, 9)), *((name, 3) for name in MEMORY)]
)
def test_a_run_that_is_killed_anywhere_gives_the_same(
    name: str, until: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the trunk or in a branch; with the states that steps pass on, and what was found so far."""
    monkeypatch.setattr(checkpoints, "MAX_TIME_SHARE", math.inf)
    knobs = MEMORY.get(name, {})

    def one(calls: int, store: CheckpointStore | None = None) -> tuple[Training, LanguageModel]:
        model, count = model_of(name, **knobs), 0

        def batches(step: int, done: float) -> Batch:
            nonlocal count
            count += 1
            if count > calls:
                raise Killed
            return batch(step)

        def score() -> float:
            with torch.no_grad():
                return float(model.eval()(batch(30).inputs, causal=True).logits.sum())

        with torch.random.fork_rng():
            training = run(
                model,
                budget_of(8, 4),
                batches,
                carry_state=True,
                checkpoints=store,
                evaluate=score,
                validate=score,
                validations=4,
            )
        return training, model

    def store() -> CheckpointStore:
        return CheckpointStore(
            folder=tmp_path, cell_id="c", code_sha256="x", device_name=None, every_seconds=0.0
        )

    whole, model = one(100)
    with pytest.raises(Killed):
        one(until, store())
    resumed, again = one(100, store())
    assert resumed.results == whole.results
    assert resumed.validations == whole.validations
    assert [tokens for tokens, _ in whole.validations] == [64, 128, 192, 256]
    assert [row.nll for row in resumed.curve.rows] == [row.nll for row in whole.curve.rows]
    assert all(map(same, again.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("name", MEMORY)
def test_a_step_with_carried_state_reads_the_step_before(name: str) -> None:
    """Its loss is that of the second half of a text that is read at once; from no state it is another one."""
    model = model_of(name, **MEMORY[name]).eval()
    first, second = batch(0), batch(1)
    with torch.no_grad():
        both = torch.cat([first.inputs, second.inputs], dim=1)
        logits = torch.cat([out.logits for _, out in model.stream(both, causal=True)], dim=1)
        states = [out.states for _, out in model.stream(first.inputs, causal=True)][-1]
    expected = torch.nn.functional.cross_entropy(
        logits[:, SIZES.seq_len :].flatten(0, 1), second.targets.flatten()
    )
    found, fresh = (
        training_step(model, optimizer_for(model, 0.0), second, causal=True, states=start).nll
        for start in (states, None)
    )
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(fresh, expected, rtol=1e-5, atol=0)


def test_training_on_continuous_text_passes_states_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step gets what the step before returned, without a graph; without the knob each begins anew."""
    given_: list[Any] = []
    step = training_step

    def spy(*args: Any, states: Any, **more: Any) -> StepOut:
        out = step(*args, states=states, **more)
        given_.append((states, out.states))
        return out

    monkeypatch.setattr(loop, "training_step", spy)
    run(model_of("transformer_xl", **MEMORY["transformer_xl"]), Budget(steps=3), carry_state=True)
    assert given_[0][0] is None
    assert all(before[1] is after[0] for before, after in pairwise(given_))
    assert not any(state.requires_grad for state in given_[-1][1])
    given_.clear()
    run(model_of("transformer_xl", **MEMORY["transformer_xl"]), Budget(steps=3))
    assert [states for states, _ in given_] == [None] * 3


def parabola(best: float) -> Callable[[float], float]:
    return lambda rate: (math.log(rate) - math.log(best)) ** 2


def test_a_search_takes_the_best_rate() -> None:
    found = search((1e-3, 3e-3, 1e-2), parabola(3e-3))
    assert found.best == 3e-3
    assert list(found.nlls) == [1e-3, 3e-3, 1e-2]


@pytest.mark.parametrize(("best", "tried"), [(3e-2, [1e-3, 3e-3, 1e-2, 0.033, 0.11]), (1e-9, None)])
def test_a_search_goes_on_beyond_an_end(best: float, tried: list[float] | None) -> None:
    found = search((1e-3, 3e-3, 1e-2), parabola(best))
    if tried:
        assert list(found.nlls) == tried
        assert found.best == 0.033
    else:
        assert len(found.nlls) == 3 + MAX_FURTHER, "and ends"
        assert found.best == min(found.nlls)


def test_a_rate_that_diverges_is_not_the_best() -> None:
    found = search((1e-3, 1e-2, 1e-1), lambda rate: math.inf if rate > 5e-3 else parabola(1e-3)(rate))
    assert found.best == 1e-3
    assert list(found.nlls) == [1e-4, 1e-3, 1e-2, 1e-1], "which is at an end"
    lower = search((1e-3, 1e-2), lambda _: math.inf)
    assert list(lower.nlls) == [1e-5, 1e-4, 1e-3, 1e-2], "if all diverge, lower ones may not"


SMALL = ("data=stdlib", "seq_len=32", "depth=1", "model.d_model=16", "measure=standard")
TRAINED = ("measure.train_tokens=256", "measure.eval_tokens=64", "measure.schedule=wsd")


def test_only_steps_of_training_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored during training has other shapes, for which the compiler would start again."""
    (cell,) = swept(*SMALL, *TRAINED, "measure.train_budgets=2", "measure.validations=2")
    model = predict.build_model(cell.spec)
    has_gradients: list[bool] = []

    def compiled(visits: Any, *others: Any) -> Any:
        has_gradients.append(torch.is_grad_enabled())
        return STRATEGIES["keep"].run(visits, *others)

    monkeypatch.setattr("bench.scenarios.training.compiling", lambda model, _: model.running(compiled))
    store = CheckpointStore(
        folder=tmp_path, cell_id="c", code_sha256="x", device_name=None, every_seconds=math.inf
    )
    make_task, config, setting = cell.spec.task()
    told: dict[str, Any] = {}
    run_of_cell = TrainingRun(
        spec=cell.spec,
        task=make_task(config, setting),
        device=torch.device("cpu"),
        folder=tmp_path,
        checkpoints=store,
        report=told.update,
    )
    training = run_of_cell.run(model)
    assert len(training.results) == 1
    assert len(told["validation_nll"]) == 2
    assert has_gradients == [True] * (8 + 1)  # 256 tokens, and the decay of the branch


def test_a_task_without_continuous_text_carries_no_state() -> None:
    """Its sequences have nothing to do with each other."""
    carried = (*TRAINED, "measure=standard", "measure.carry_state=true", "variant=transformer_xl")
    (text,), (task,) = (swept(*carried, data) for data in ("data=stdlib", "data=mqar"))
    check_supported(text.spec)
    with pytest.raises(Unsupported, match="carry_state=true: data=mqar has no continuous text"):
        check_supported(task.spec)
