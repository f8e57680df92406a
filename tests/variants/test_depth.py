"""What every depth schedule promises. It is found by its file; only the last tests name one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import numbers
from test_depth_lengths import KNOBS

import variants
from bench.measure.flops import CountFlops
from bench.measure.step import StepFigures, Subject, predicted
from bench.model.activations import STRATEGIES
from bench.model.block import BlockOptions
from bench.model.decode import Decoder
from bench.model.initial_weights import initial_std
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule, feed_forward
from bench.tasks.base import Batch
from bench.train.step import optimizer_for, training_step
from variants.base import Context, DepthConfig, DepthSchedule, Dims, Path, Workload
from variants.depth.layer_drop import LayerDrop, LayerDropConfig
from variants.depth.shared import Shared, SharedConfig
from variants.depth.universal import Universal, UniversalConfig
from variants.slots import STACK

T, VOCABULARY = 24, 11
SIZES = Dims(seq_len=T, d_model=16, heads=2)
DEPTHS = (1, 2, 5)

every_name = pytest.mark.parametrize("name", STACK.names())


def spec_of(
    name: str, variant: str = "dense", schedule: Mapping[str, Any] | None = None, **knobs: Any
) -> ModelSpec:
    loaded = variants.load(variant)
    config = loaded.Config(**knobs)
    depth = depth_schedule(name, **(schedule or {}))
    return ModelSpec.of(loaded, config, feed_forward=feed_forward(mult=2), depth=depth)


def model_of(spec: ModelSpec, depth: int = 3, **changed: Any) -> LanguageModel:
    torch.manual_seed(0)
    given = {"dropout": 0.0, "vocabulary": VOCABULARY, "activations": "keep", **changed}
    return LanguageModel(spec, SIZES, depth=depth, **given)


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(seed))


def is_causal(spec: ModelSpec) -> bool:
    return spec.no_form(causal=True) is None


def gradients(model: LanguageModel, seed: int = 1) -> list[torch.Tensor | None]:
    torch.manual_seed(seed)
    batch = Batch(ids(), ids(1))
    training_step(model.train(), optimizer_for(model, 0.0), batch, causal=is_causal(model.spec))
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
    assert len(made.lengths(T)) == len(visits)
    assert len(model_of(spec_of(name), depth).blocks) == made.blocks


@every_name
def test_every_parameter_is_trained(name: str) -> None:
    """In one of a few steps: a schedule may leave out visits."""
    model = model_of(spec_of(name, schedule=KNOBS.get(name)))
    steps = [gradients(model, seed) for seed in range(5)]
    for each in zip(*steps, strict=True):
        assert any(grad is not None and grad.abs().max() > 0 for grad in each)


@every_name
def test_dispatched_flops_are_those_of_the_formula(name: str) -> None:
    model = model_of(spec_of(name)).eval()
    causal = model.spec.no_form(causal=False) is not None
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=causal)
    with CountFlops() as counter, torch.no_grad():
        model(ids(), causal=causal)
    assert counter.total == model.cost(work).total


@every_name
def test_a_model_with_a_plain_path_is_its_visits_one_after_the_other(name: str) -> None:
    model = model_of(spec_of(name)).double().eval()
    assert spec_of(name).has_own_path(3, SIZES) == (type(model.path) is not Path)
    if type(model.path) is not Path:
        pytest.skip("its path computes between the visits, or chooses for each token")
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
    model = model_of(spec_of(name), activations=activations, dropout=0.1)
    assert_recomputes(model, activations, seed=1)


def assert_recomputes(model: LanguageModel, activations: str, seed: int) -> int:
    """The gradients are those of stored activations; returns the number of parameters that have one."""
    got = gradients(model, seed)
    with model.running(STRATEGIES[activations].stored):
        want = gradients(model, seed)
    largest = max(float(grad.abs().max()) for grad in want if grad is not None)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).abs().max() <= 1e-5 * largest
    return sum(grad is not None for grad in got)


@every_name
def test_segments_carry_the_state_of_every_visit(name: str) -> None:
    """Unless their lengths are changed."""
    spec = spec_of(name, "transformer_xl", segment=8, mem_len=8)
    if not is_causal(spec) or {*model_of(spec_of(name)).depth_schedule.lengths(T)} != {T}:
        assert spec.no_form(causal=True) or spec.wrong_lengths(3, SIZES, causal=True)
        return
    model = model_of(spec).eval()
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


ORDERS = ("sequence", "cycle", "reverse")


@pytest.mark.parametrize(
    ("order", "depth", "groups", "visits"),
    [
        ("sequence", 6, 3, "001122"),
        ("cycle", 6, 3, "012012"),
        ("reverse", 6, 3, "012210"),
        ("sequence", 9, 3, "000111222"),
        ("cycle", 9, 3, "012012012"),
        ("reverse", 9, 3, "012012210"),
        ("sequence", 4, 2, "0011"),
        ("reverse", 2, 1, "00"),
    ],
)
def test_shared_blocks_are_visited_in_the_orders_of_the_papers(
    order: Any, depth: int, groups: int, visits: str
) -> None:
    schedule = Shared(SharedConfig(groups=groups, order=order), depth)
    assert "".join(map(str, schedule.visits())) == visits
    assert schedule.blocks == groups


def same_model(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether both have the same visits, parameters, logits and gradients."""
    models = [model_of(spec, 4) for spec in (one, other)]
    logits = [model(ids(), causal=True).logits for model in models]
    pairs = zip(*(gradients(model) for model in models), strict=True)
    return torch.equal(*logits) and all(torch.equal(*pair) for pair in pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ORDERS)
def test_as_many_groups_as_visits_are_a_stack_and_one_group_is_universal(order: str) -> None:
    def shared(groups: int) -> ModelSpec:
        return spec_of("shared", schedule={"groups": groups, "order": order})

    assert same_model(shared(4), spec_of("stack"))
    assert same_model(shared(1), spec_of("universal"))
    assert not same_model(shared(1), spec_of("stack"))


def test_a_shared_block_has_the_gradient_of_all_its_visits() -> None:
    """Against a stack with copies of the blocks: the gradient of a parameter is the sum over its copies."""
    shared = model_of(spec_of("shared", schedule={"groups": 2, "order": "reverse"}), 4).double()
    stack = model_of(spec_of("stack"), 4).double()
    stack.load_state_dict(shared.state_dict(), strict=False)
    visits = [0, 1, 1, 0]
    for block, index in zip(stack.blocks, visits, strict=True):
        block.load_state_dict(shared.blocks[index].state_dict())
    for model in (shared, stack):
        model(ids(), causal=True).logits.logsumexp(-1).square().sum().backward()
    for index, block in enumerate(shared.blocks):
        for name, parameter in block.named_parameters():
            copies = [stack.blocks[n].get_parameter(name) for n in range(4) if visits[n] == index]
            want = torch.stack([copy.grad for copy in copies if copy.grad is not None]).sum(0)
            torch.testing.assert_close(parameter.grad, want)


def test_groups_that_do_not_divide_the_depth_are_refused() -> None:
    spec = spec_of("shared", schedule={"groups": 3})
    assert spec.conflict(6, "keep") is None
    assert spec.conflict(7, "keep") == (
        "stack.groups=3: must divide depth=7; the nearest smaller divisor is 1"
    )
    assert spec.conflict(2, "keep") == (
        "stack.groups=3: must divide depth=2; the nearest smaller divisor is 2"
    )


@pytest.mark.parametrize(
    ("name", "knobs", "depth", "small"),
    [
        ("stack", {}, 1, 1),
        ("stack", {}, 12, 2),
        ("universal", {}, 12, 2),
        ("shared", {"groups": 1}, 12, 2),
        ("shared", {"groups": 3}, 12, 6),
        ("shared", {"groups": 6}, 12, 12),
        ("shared", {"groups": 12}, 12, 12),
        ("shared", {"groups": 2**15}, 2**16, 2**16),
    ],
)
def test_gates_check_a_small_model_that_shares_as_the_large_one(
    name: str, knobs: dict[str, Any], depth: int, small: int
) -> None:
    assert spec_of(name, schedule=knobs).representative_depth(depth, "keep") == small


def test_the_small_model_of_a_mixture_has_all_kinds_of_layers() -> None:
    layers = ("longformer", "longformer", "dense")
    assert spec_of("stack", "hybrid", layers=layers).representative_depth(12, "keep") == 3
    shared = spec_of("shared", "hybrid", {"groups": 4}, layers=layers)
    assert shared.representative_depth(12, "keep") == 8


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


TOLD = {"signal": True}


def coordinate(t: int, channel: int, d_model: int) -> float:
    """The part of the step in the paper's coordinate embedding (§2.1, the formulas for P)."""
    angle = t / 10_000 ** (2 * (channel // 2) / d_model)
    return math.cos(angle) if channel % 2 else math.sin(angle)


@pytest.mark.parametrize("d_model", [1, 7, 16])
def test_each_visit_is_told_its_number_by_the_formula_of_the_paper(d_model: int) -> None:
    got = Universal(UniversalConfig(signal=True), 5).signals(d_model)
    want = [[coordinate(t, channel, d_model) for channel in range(d_model)] for t in range(1, 6)]
    torch.testing.assert_close(got, torch.tensor(want))
    assert Universal(UniversalConfig(), 5).signals(d_model) is None


@pytest.mark.parametrize("position", ["pre", "post"])
def test_the_signal_is_added_before_each_visit(position: Any) -> None:
    """In the scale of an embedding."""
    spec = replace(spec_of("universal", schedule=TOLD), block=BlockOptions(norm_position=position))
    model = model_of(spec).double()
    x = want = model.embedding(ids())
    for t in (1, 2, 3):
        vector = torch.tensor([coordinate(t, channel, 16) for channel in range(16)], dtype=torch.float64)
        signal = (vector.float() * initial_std(16)).double()
        want = model.blocks[0](want + signal, None, Context(causal=True)).x
    torch.testing.assert_close(model.run_visits(x, None, Context(causal=True)).y, want)
    assert "signals" not in model.state_dict(), "it follows from the knobs"


@pytest.mark.parametrize("activations", [name for name, own in STRATEGIES.items() if not own.needs_device])
def test_strategies_hold_for_visits_with_a_signal(activations: str) -> None:
    """With dropout. In the reversible network the signal is a part of the branch of the mixer."""
    model = model_of(spec_of("universal", schedule=TOLD), activations=activations, dropout=0.1, ff_chunks=3)
    assert_recomputes(model, activations, seed=1)
    if activations == "reversible":
        block, x = model.blocks[0].eval(), model.embedding(ids())
        assert model.signals is not None
        first = second = x
        for signal in model.signals:
            first = first + signal + block.attend(second + signal, None, Context(causal=True)).y
            second = second + block.feed(first).y
        got = model.run_visits(x, None, Context(causal=True)).y
        torch.testing.assert_close(got, (first + second) / 2)


def test_a_model_with_a_signal_decodes_and_plans_as_one_without() -> None:
    model, usual = (
        model_of(spec_of("universal", schedule=schedule)).double().eval() for schedule in (TOLD, {})
    )
    decoder = Decoder(model, 2, T)
    with torch.no_grad():
        want = model(ids(), causal=True).logits
        assert not torch.allclose(want, usual(ids(), causal=True).logits)
    got = [decoder.read_all(ids()[:, :9]), *map(decoder.read_all, ids()[:, 9:].split(1, 1))]
    torch.testing.assert_close(torch.cat(got, 1).float(), want, rtol=1e-5, atol=1e-5)
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=True)
    assert model.cost(work) == usual.cost(work)


HALF = {"rate": 0.5}


def places_of(model: LanguageModel, seed: int) -> list[int]:
    """The visits that the next step makes, by their hooks."""
    made: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, n=n: made.append(n)) for n, block in enumerate(model.blocks)
    ]
    gradients(model, seed)
    for hook in hooks:
        hook.remove()
    return made


def test_without_a_rate_nothing_is_left_out_and_no_number_is_drawn() -> None:
    assert same_model(spec_of("layer_drop", schedule={"rate": 0.0}), spec_of("stack"))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = model_of(spec_of("layer_drop", schedule={"rate": 0.0})).train()
    torch.manual_seed(0)
    model(ids(), causal=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_left_out_is_the_identity_and_has_no_gradient() -> None:
    """Against the blocks that are left, one after the other. The seed decides which these are."""
    model = model_of(spec_of("layer_drop", schedule=HALF), 6)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        made = [*model.depth_schedule.draw()]
        assert places_of(model, seed) == made
        for place, block in enumerate(model.blocks):
            assert all((p.grad is not None) == (place in made) for p in block.parameters())
        x = want = model.embedding(ids())
        for place in made:
            want = model.visits[place](want, None, Context(causal=True)).x
        torch.manual_seed(seed)
        assert torch.equal(model.run_visits(x, None, Context(causal=True)).y, want)
        seen.add(tuple(made))
    assert len(seen) > 6


def test_visits_are_left_out_at_the_rate() -> None:
    schedule = LayerDrop(LayerDropConfig(rate=0.3), 50)
    torch.manual_seed(0)
    draws = [schedule.draw() for _ in range(400)]
    assert all([*made] == sorted({*made}) for made in draws)
    kept = torch.zeros(50)
    for made in draws:
        kept[[*made]] += 1
    # 20,000 draws have a standard deviation of 0.0032, and 400 of 0.023
    assert kept.mean() / 400 == pytest.approx(0.7, abs=0.013)
    assert (kept / 400 - 0.7).abs().max() < 0.1


@pytest.mark.parametrize("activations", [name for name, own in STRATEGIES.items() if not own.needs_device])
@pytest.mark.parametrize("ff_chunks", [1, 3])
def test_a_recomputation_leaves_out_the_same_visits(activations: str, ff_chunks: int) -> None:
    """With dropout; also for a step that makes no visit."""
    spec = spec_of("layer_drop", schedule={"rate": 0.7})
    model = model_of(spec, 3, activations=activations, dropout=0.1, ff_chunks=ff_chunks)
    trained = [assert_recomputes(model, activations, seed) for seed in range(12)]
    assert len({*trained}) > 2
    assert min(trained) == 4, "embedding, output layer and the last norm"


def test_evaluation_and_figures_of_cost_make_all_visits() -> None:
    spec = spec_of("layer_drop", schedule={"rate": 0.9})
    model, stack = model_of(spec, 5), model_of(spec_of("stack"), 5)
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=True)
    assert model.cost(work) == stack.cost(work)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids(), causal=True).logits, stack(ids(), causal=True).logits)

    def figures(spec: ModelSpec) -> StepFigures:
        def subject() -> Subject:
            def batch() -> Batch:
                return Batch(torch.zeros(2, T, dtype=torch.int64), torch.zeros(2, T, dtype=torch.int64))

            return Subject.make(lambda: model_of(spec, 5), batch, causal=True, device=torch.device("cpu"))

        return predicted(subject)

    assert figures(spec) == figures(spec_of("stack"))


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("transformer_xl", "carries state from each segment to the next"),
        ("routing", "is updated after a step, from what the step computed"),
    ],
)
def test_layers_that_need_every_visit_are_refused(variant: str, why: str) -> None:
    expected = f"{variant}: {why}, and stack=layer_drop leaves out visits in training"
    assert spec_of("layer_drop", variant).unsupported(3, 16) == expected
    assert spec_of("layer_drop", variant, {"rate": 0.0}).unsupported(3, 16) is None
    assert spec_of("layer_drop").unsupported(3, 16) is None
