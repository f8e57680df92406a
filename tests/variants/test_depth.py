"""What every depth schedule promises. It is found by its file; only the last tests name one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracles import numbers

import variants
from bench.measure.flops import CountFlops
from bench.model.activations import STRATEGIES
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule, feed_forward
from bench.tasks.base import Batch
from bench.train.step import optimizer_for, training_step
from variants.base import Context, DepthConfig, DepthSchedule, Dims, Workload
from variants.slots import STACK

T, VOCABULARY = 24, 11
SIZES = Dims(seq_len=T, d_model=16, heads=2)
DEPTHS = (1, 2, 5)

every_name = pytest.mark.parametrize("name", STACK.names())


def spec_of(name: str, variant: str = "dense", **knobs: Any) -> ModelSpec:
    loaded = variants.load(variant)
    config = loaded.Config(**knobs)
    return ModelSpec.of(loaded, config, feed_forward=feed_forward(mult=2), depth=depth_schedule(name))


def model_of(spec: ModelSpec, depth: int = 3, **changed: Any) -> LanguageModel:
    torch.manual_seed(0)
    given = {"dropout": 0.0, "vocabulary": VOCABULARY, "activations": "keep", **changed}
    return LanguageModel(spec, SIZES, depth=depth, **given)


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(seed))


def gradients(model: LanguageModel) -> list[torch.Tensor | None]:
    torch.manual_seed(1)
    training_step(model.train(), optimizer_for(model, 0.0), Batch(ids(), ids(1)), causal=True)
    return [p.grad for p in model.parameters()]


@every_name
def test_config_is_frozen_and_says_its_paper(name: str) -> None:
    schedule = STACK.load(name)
    assert issubclass(schedule, DepthSchedule)
    assert issubclass(schedule.Config, DepthConfig)
    assert schedule.Config.__dataclass_params__.frozen
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(schedule.Config))
    assert schedule.paper.strip()
    assert (schedule.__doc__ or "").strip()


@every_name
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_block_is_visited_and_no_other(name: str, depth: int) -> None:
    """Block 0 first: what is not visited would be parameters without a gradient."""
    schedule = STACK.load(name)
    made = schedule(schedule.Config(), depth)
    visits = [*made.visits()]
    assert visits
    assert {*visits} == {*range(made.blocks)}
    assert [*made.visits()] == visits, "a schedule has no state"
    assert len(model_of(spec_of(name), depth).blocks) == made.blocks


@every_name
def test_every_parameter_is_trained(name: str) -> None:
    model = model_of(spec_of(name))
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients(model))


@every_name
def test_dispatched_flops_are_those_of_the_formula(name: str) -> None:
    model = model_of(spec_of(name, impl="naive"))
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=False)
    with CountFlops() as counter, torch.no_grad():
        model(ids(), causal=False)
    assert counter.total == model.cost(work).total


@every_name
def test_the_model_is_its_visits_one_after_the_other(name: str) -> None:
    model = model_of(spec_of(name)).double()
    x = numbers(2, T, 16).detach()
    want = x
    for block in model.visits:
        want = block(want, None, Context(causal=True)).x
    assert torch.equal(model.run_visits(x, None, Context(causal=True)).y, want)


@every_name
@pytest.mark.parametrize("activations", [name for name, own in STRATEGIES.items() if not own.needs_device])
def test_every_strategy_works_or_says_why_not(name: str, activations: str) -> None:
    schedule = STACK.load(name)
    reason = schedule.unsupported(schedule.Config(), depth=3, activations=activations)
    if reason is not None:
        assert reason.strip()
        assert "\n" not in reason
        return
    model = model_of(spec_of(name), activations=activations)
    got = gradients(model)
    with model.running(STRATEGIES[activations].stored):
        want = gradients(model)
    largest = max(float(grad.abs().max()) for grad in want if grad is not None)
    for one, other in zip(got, want, strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).abs().max() <= 1e-5 * largest


@every_name
def test_segments_carry_the_state_of_every_visit(name: str) -> None:
    model = model_of(spec_of(name, "transformer_xl", segment=8, mem_len=8)).eval()
    with torch.no_grad():
        outputs = [out for _, out in model.stream(ids(), causal=True)]
    assert [len(out.states) for out in outputs] == [len(model.visits)] * 3
    before, changed = outputs[2].logits, ids()
    changed[:, 8:16] = ids(2)[:, 8:16]
    with torch.no_grad():
        *_, last = (out.logits for _, out in model.stream(changed, causal=True))
    assert not torch.equal(last, before), "the segment before is read"


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_universal_transformer_costs_a_stack_with_the_parameters_of_one_block(depth: int) -> None:
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=True)
    universal, stack, one = (
        model_of(spec_of(name), n) for name, n in (("universal", depth), ("stack", depth), ("stack", 1))
    )
    assert universal.cost(work) == stack.cost(work)
    assert universal.state_bytes(work) == stack.state_bytes(work)
    counts = [sum(p.numel() for p in model.parameters()) for model in (universal, one)]
    assert counts[0] == counts[1]


def test_kinds_of_layers_are_counted_by_visits() -> None:
    for name in ("universal", "stack"):
        assert [*spec_of(name).kinds(5).values()] == [5]


def test_what_is_updated_after_a_step_is_visited_once() -> None:
    """Routing takes its centroids from the last visit, which is another one if activations are recomputed.
    The record says so, so that a sweep over variants goes on."""
    spec = spec_of("universal", "routing", window=8)
    assert spec.unsupported(1, 16) is None
    reason = "routing: is updated after a step, and stack=universal visits a block 3 times in a step; "
    assert spec.unsupported(3, 16) == f"{reason}allowed is once"
    assert spec_of("stack", "routing", window=8).unsupported(3, 16) is None
