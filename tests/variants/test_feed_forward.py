"""What every feed-forward layer promises. It is found by its file; only the last tests name one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args, get_origin

import pytest
import torch
from oracles import D_MODEL, EXACT, assert_same, difference, numbers
from torch._subclasses.fake_tensor import FakeTensorMode

import variants
from bench.measure import causality_gate, gates
from bench.measure.flops import CountFlops
from bench.model.block import Block
from bench.model.slots import feed_forward
from variants.base import Context, Cost, Dims, FeedForward, FeedForwardConfig, FFOut, Workload
from variants.feed_forward.glu import GLU, GLUConfig
from variants.feed_forward.mlp import MLP, MLPConfig
from variants.knobs import knobs_of
from variants.slots import FEED_FORWARD

TOKENS = 9


class Case(NamedTuple):
    """A feed-forward layer with a configuration."""

    layer: type[FeedForward]
    config: FeedForwardConfig

    def made(self) -> FeedForward:
        torch.manual_seed(0)
        return self.layer(self.config, D_MODEL).double()


def cases() -> Iterator[object]:
    """Every layer with its defaults, and with each other word of its knobs."""
    for name in FEED_FORWARD.names():
        layer = FEED_FORWARD.load(name)
        yield pytest.param(Case(layer, layer.Config()), id=name)
        for knob in knobs_of(layer.Config).values():
            words = get_args(knob.hint) if get_origin(knob.hint) is Literal else ()
            for word in words:
                if word != knob.default:
                    config = layer.Config.of({knob.name: word})
                    yield pytest.param(Case(layer, config), id=f"{name}-{knob.name}={word}")
        if "width" in knobs_of(layer.Config):
            for width in (1, D_MODEL + 5):
                yield pytest.param(Case(layer, layer.Config.of({"width": width})), id=f"{name}-width={width}")


def seeded(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The same random numbers for every call: training may be random."""
    torch.manual_seed(2)
    return call()


every_name = pytest.mark.parametrize("name", FEED_FORWARD.names())
every_case = pytest.mark.parametrize("case", [*cases()])


@every_name
def test_config_is_frozen_and_says_its_paper(name: str) -> None:
    layer = FEED_FORWARD.load(name)
    assert issubclass(layer, FeedForward)
    assert issubclass(layer.Config, FeedForwardConfig)
    assert layer.Config.__dataclass_params__.frozen
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(layer.Config))
    assert layer.paper.strip()
    assert (layer.__doc__ or "").strip()
    assert layer.unsupported(layer.Config(), D_MODEL) is None


@every_case
def test_forward_is_the_reference(case: Case) -> None:
    one, x = case.made(), numbers(2, TOKENS, D_MODEL)
    out = one(x)
    assert isinstance(out, FFOut)
    for training in (True, False):
        one.train(training)
        assert_same(
            lambda: seeded(lambda: one(x).y), lambda: seeded(lambda: one.reference(x)), [x, *one.parameters()]
        )
    assert gates.feed_forward_error(case.layer, case.config, D_MODEL, torch.device("cpu")) < 1e-5


@every_case
def test_rounding_to_bfloat16_explains_the_errors(case: Case) -> None:
    """The reference makes the choices of the fast path."""
    if getattr(case.config, "width", None) == 1:
        pytest.skip("the rounding of a single hidden channel is that of a whole row")
    gates.feed_forward_dtype_errors(case.layer, case.config, 64, torch.device("cpu"), torch.bfloat16)


@every_case
def test_a_million_tokens_are_planned_without_memory(case: Case) -> None:
    with FakeTensorMode():
        one = case.layer(case.config, D_MODEL)
        one(torch.zeros(1, 2**20, D_MODEL)).y.sum().backward()
        assert one.eval()(torch.zeros(3, 1, D_MODEL)).y.shape == (3, 1, D_MODEL)


@every_case
def test_every_token_goes_through_by_itself(case: Case) -> None:
    one, x = case.made().eval(), numbers(2, TOKENS, D_MODEL).detach()
    parts = torch.cat([one(x[:, t : t + 1]).y for t in range(TOKENS)], dim=1)
    assert difference(one(x).y, parts) <= EXACT


@every_case
def test_dispatched_flops_are_those_of_the_formula(case: Case) -> None:
    with CountFlops() as counter, torch.no_grad():
        case.made()(numbers(3, TOKENS, D_MODEL))
    work = Workload(batch_size=3, seq_len=TOKENS, d_model=D_MODEL, heads=1, causal=True)
    cost = case.made().cost(work)
    assert counter.total == cost.total
    assert cost.mixing == 0, "no token reads another"


@every_case
def test_a_forward_pass_leaves_no_state(case: Case) -> None:
    """A pass may be computed again, and chunks of a sequence in any order."""
    one, x = case.made().train(), numbers(2, TOKENS, D_MODEL).detach()
    attributes = {*vars(one)}
    before = {name: value.clone() for name, value in one.state_dict().items()}
    first = seeded(lambda: one(x).y)
    one(numbers(1, 3, D_MODEL))
    assert torch.equal(seeded(lambda: one(x).y), first)
    after = one.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {*vars(one)} == attributes


@every_case
def test_a_block_in_chunks_equals_the_whole_block(case: Case) -> None:
    """In outputs and gradients, where the last chunk is shorter than the others."""
    mixer = variants.load_mixer("dense")
    sizes = Dims(seq_len=TOKENS, d_model=D_MODEL, heads=2)
    block = Block(mixer(mixer.Config(), sizes), case.made(), D_MODEL, ff_chunks=1, dropout=0.0)
    block = block.double().eval()  # in training, a layer may draw random numbers for the tokens of a call
    x = numbers(2, TOKENS, D_MODEL)

    def run(chunks: int) -> torch.Tensor:
        block.ff_chunks = chunks
        y: torch.Tensor = block(x, None, Context(causal=True)).x
        return y

    assert_same(lambda: run(4), lambda: run(1), [x, *block.parameters()])


def test_the_mlp_costs_two_products() -> None:
    work = Workload(batch_size=1, seq_len=5, d_model=4, heads=1, causal=True)
    assert MLP(MLPConfig(mult=3), 4).cost(work) == Cost({"feed_forward": 5 * 2 * 2 * 3 * 4 * 4})
    with pytest.raises(ValueError, match=r"^mult=0: allowed is "):
        MLPConfig(mult=0)


@pytest.mark.parametrize(
    ("activation", "wanted"),
    [
        ("gelu", [-0.15865525, 0.0, 0.84134475, 1.95449974]),
        ("relu", [0.0, 0.0, 1.0, 2.0]),
        ("silu", [-0.26894142, 0.0, 0.73105858, 1.76159416]),
        ("squared_relu", [0.0, 0.0, 1.0, 4.0]),
    ],
)
def test_the_mlp_applies_its_activation(activation: str, wanted: list[float]) -> None:
    """Identity matrices leave the activation alone."""
    one = MLP(MLPConfig.of({"activation": activation, "mult": 1}), 4).double()
    with torch.no_grad():
        one.up.weight.copy_(torch.eye(4))
        one.out.weight.copy_(torch.eye(4))
        y = one(torch.tensor([[[-1.0, 0.0, 1.0, 2.0]]], dtype=torch.float64)).y
    torch.testing.assert_close(y.flatten(), torch.tensor(wanted, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("d_model", [64, 256, 768, 1000])
@pytest.mark.parametrize("mult", [1, 4, 8])
def test_a_gated_unit_has_about_as_many_parameters_as_the_mlp(d_model: int, mult: int) -> None:
    """Two thirds of the width, to the nearest multiple of 8: half of 8 off at most."""
    with torch.device("meta"):
        layers = MLP(MLPConfig(mult=mult), d_model), GLU(GLUConfig(mult=mult), d_model)
    mlp, glu = (sum(p.numel() for p in layer.parameters()) for layer in layers)
    assert abs(glu - mlp) <= 3 * d_model * 4
    assert GLUConfig(mult=mult).hidden(d_model) % 8 == 0
    assert GLUConfig(mult=1).hidden(2) == 8


def test_a_gated_unit_with_a_sigmoid_is_half_the_values_at_a_gate_of_zero() -> None:
    one = GLU(GLUConfig(activation="sigmoid"), D_MODEL).double()
    x = numbers(1, 2, D_MODEL).detach()
    with torch.no_grad():
        gate, value = one.up.weight.chunk(2)
        gate.zero_()
        torch.testing.assert_close(one(x).y, x @ value.T / 2 @ one.out.weight.T)


def test_an_unknown_layer_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^feed_forward=gluu: unknown; there are .*; did you mean glu\?$"):
        feed_forward("gluu")


def test_a_gate_finds_a_wrong_layer() -> None:
    class Wrong(MLP):
        def forward(self, x: torch.Tensor) -> FFOut:
            return FFOut(super().forward(x).y * 1.001)

    with pytest.raises(gates.GateFailed, match="feed-forward"):
        gates.feed_forward_error(Wrong, MLPConfig(), D_MODEL, torch.device("cpu"))


@pytest.mark.parametrize("name", ["mlp", "glu"])
def test_a_width_takes_the_place_of_a_multiple(name: str) -> None:
    """The same layer, if it is the width that the multiple gives; and any other width."""
    layer = FEED_FORWARD.load(name)
    by_mult = layer.Config.of({"mult": 3})
    by_width = layer.Config.of({"width": by_mult.hidden(D_MODEL)})  # type: ignore[attr-defined]
    shapes = [[p.shape for p in layer(config, D_MODEL).parameters()] for config in (by_mult, by_width)]
    assert shapes[0] == shapes[1]
    odd = layer(layer.Config.of({"width": 37}), D_MODEL)
    assert odd.out.weight.shape == (D_MODEL, 37)


def _next_token(x: torch.Tensor) -> torch.Tensor:
    return x + torch.cat([x[:, 1:], x[:, -1:]], dim=1)


def _batch_mean(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0, keepdim=True)


def _most_of_the_batch(x: torch.Tensor) -> torch.Tensor:
    """The half of all tokens that have the largest norms."""
    norms = x.detach().norm(dim=-1)
    return x * (norms >= norms.median())[..., None]


@pytest.mark.parametrize("fault", [_next_token, _batch_mean, _most_of_the_batch])
@pytest.mark.parametrize("training", [False, True])
def test_a_gate_finds_a_layer_that_reads_other_tokens(
    fault: Callable[[torch.Tensor], torch.Tensor], training: bool
) -> None:
    """In training alone, or in evaluation alone."""

    class Reading(MLP):
        def forward(self, x: torch.Tensor) -> FFOut:
            return super().forward(fault(x) if self.training == training else x)

    cpu = torch.device("cpu")
    assert causality_gate.feed_forward_leak(MLP, MLPConfig(), D_MODEL, cpu) < 1e-5
    with pytest.raises(gates.GateFailed, match="the feed-forward layer: changing other tokens"):
        causality_gate.feed_forward_leak(Reading, MLPConfig(), D_MODEL, cpu)


@every_case
def test_the_gate_passes_every_layer(case: Case) -> None:
    leak = causality_gate.feed_forward_leak(case.layer, case.config, D_MODEL, torch.device("cpu"))
    assert leak <= causality_gate.LEAK_TOLERANCE


def test_of_a_layer_that_reads_earlier_tokens_later_ones_are_checked() -> None:
    """A capacity drops tokens by their place in their own sequence."""
    layer = FEED_FORWARD.load("switch")
    tight = layer.Config.of({"n_experts": 4, "capacity_factor": 0.5})
    assert layer.reads_others(tight)
    assert causality_gate.feed_forward_leak(layer, tight, D_MODEL, torch.device("cpu")) < 1e-5

    class Later(layer):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> FFOut:
            return super().forward(_next_token(x))

    with pytest.raises(gates.GateFailed, match="changing other tokens"):
        causality_gate.feed_forward_leak(Later, tight, D_MODEL, torch.device("cpu"))
