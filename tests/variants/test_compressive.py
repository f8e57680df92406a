"""Compressive Transformer: what is compressed when, and which loss trains what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.evaluate.nll import evaluate
from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.text import Batch
from bench.train.step import optimizer_for, training_step
from variants.attention.compressive import Compressive, CompressiveConfig, State
from variants.attention.transformer_xl import TransformerXL, TransformerXLConfig
from variants.base import Context, Workload
from variants.ops.segments.compression import COMPRESSIONS

SMALL: list[dict[str, Any]] = [
    {"segment": 12, "mem_len": 9, "comp_len": 3, "rate": 4},
    {"segment": 16, "mem_len": 16, "comp_len": 2, "rate": 3, "compression": "most_used"},
    {"segment": 8, "mem_len": 9, "comp_len": 5, "rate": 3, "segments_at_once": 3},
]

CPU = torch.device("cpu")
NAMES = sorted(COMPRESSIONS)
LEARNT = ["conv", "dilated_conv"]


def dims(tokens: int, batch: int = 1, channels: int = 8, heads: int = 2) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=channels, heads=heads)


def make(compression: str = "conv", **knobs: int) -> Compressive:
    torch.manual_seed(0)
    layer = Compressive(CompressiveConfig(compression=compression, **knobs), dims(64)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def run(layer: Any, x: Tensor) -> tuple[Tensor, list[Tensor | None], list[Any]]:
    """Outputs, losses and states of the segments of x."""
    state, outs = None, []
    for segment in layer.input_schedule(layer.config).segments(x.shape[1]):
        outs.append(layer(x[:, segment], Context(causal=True), state=state))
        state = outs[-1].state
    return torch.cat([out.y for out in outs], dim=1), [out.aux_loss for out in outs], [o.state for o in outs]


def data(tokens: int, batch: int = 1, channels: int = 8) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, tokens, channels, dtype=torch.float64, requires_grad=True)


def grads(roots: list[Tensor], x: Tensor, layer: torch.nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    directions = [torch.randn_like(root) for root in roots]
    return list(torch.autograd.grad(roots, [x, *layer.parameters()], directions, materialize_grads=True))


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# compression


def test_pooling() -> None:
    x = torch.tensor([[1.0, 5.0, 3.0, 7.0, 9.0, 2.0]])[..., None]
    assert COMPRESSIONS["mean"](1, 3)(x, None).flatten().tolist() == [3, 6]
    assert COMPRESSIONS["max"](1, 3)(x, None).flatten().tolist() == [5, 9]


def test_most_used_keeps_the_order() -> None:
    x = torch.arange(6.0).view(1, 6, 1).repeat(2, 1, 1)
    usage = torch.tensor([[0.0, 9, 1, 8, 2, 3], [7, 0, 1, 2, 3, 6]])
    assert COMPRESSIONS["most_used"](1, 3)(x, usage).squeeze(-1).tolist() == [[1, 3], [0, 5]]


def test_conv_is_a_strided_convolution() -> None:
    torch.manual_seed(0)
    conv, x = COMPRESSIONS["conv"](4, 3), torch.randn(2, 9, 4)
    kernel = conv.get_parameter("pool.weight").view(4, 3, 4).transpose(1, 2)
    want = F.conv1d(x.transpose(1, 2), kernel, stride=3).transpose(1, 2)
    torch.testing.assert_close(conv(x, None), want)


def test_dilated_conv_is_a_dilated_convolution_then_a_strided_one() -> None:
    torch.manual_seed(0)
    conv, x = COMPRESSIONS["dilated_conv"](4, 3), torch.randn(2, 9, 4)
    spread = conv.get_parameter("spread.weight").view(4, 3, 4).transpose(1, 2)
    pool = conv.get_parameter("pool.weight").view(4, 3, 4).transpose(1, 2)
    wide = F.gelu(F.conv1d(x.transpose(1, 2), spread, padding=2, dilation=2))
    torch.testing.assert_close(conv(x, None), F.conv1d(wide, pool, stride=3).transpose(1, 2))


# the identities


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    segment=st.integers(1, 12),
    mem_len=st.integers(0, 15),
    comp_len=st.integers(0, 8),
    rate=st.integers(1, 4),
    compression=st.sampled_from(NAMES),
    batch=st.sampled_from([1, 3]),
)
def test_equals_the_reference(tokens: int, batch: int, compression: str, **knobs: int) -> None:
    layer, x = make(compression, **knobs), data(tokens, batch)
    y, losses, _ = run(layer, x)
    want = list(layer.reference_segments(x))
    want_y, want_losses = torch.cat([y for y, _ in want], dim=1), [loss for _, loss in want]
    assert [loss is None for loss in losses] == [loss is None for loss in want_losses]
    found = [loss for loss in losses if loss is not None]
    wanted = [loss for loss in want_losses if loss is not None]
    assert_same(
        [y, *found, *grads([y, *found], x, layer)], [want_y, *wanted, *grads([want_y, *wanted], x, layer)]
    )
    assert torch.equal(layer.reference(x, Context(causal=True)), want_y)


@pytest.mark.parametrize("compression", NAMES)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_no_compressed_memory_is_transformer_xl(compression: str, tokens: int) -> None:
    layer, x = make(compression, segment=7, mem_len=9, comp_len=0, rate=4), data(tokens, 3)
    plain = TransformerXL(TransformerXLConfig(segment=7, mem_len=9), dims(64)).double()
    plain.load_state_dict(layer.state_dict())
    y, losses, states = run(layer, x)
    want, _, memories = run(plain, x)
    assert losses == [None] * len(losses)
    assert_same([y, *grads([y], x, layer)], [want, *grads([want], x, plain)])
    assert all(torch.equal(a.memory, b) for a, b in zip(states, memories, strict=True))


def test_is_built_as_transformer_xl_with_a_compressor() -> None:
    torch.manual_seed(0)
    layer = Compressive(CompressiveConfig(), dims(8))
    torch.manual_seed(0)
    plain = TransformerXL(TransformerXLConfig(), dims(8))
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, layer.get_parameter(name))


def test_rate_one_by_pooling_is_a_longer_memory() -> None:
    layer, x = make("mean", segment=6, mem_len=5, comp_len=8, rate=1), data(40, 3)
    plain = TransformerXL(TransformerXLConfig(segment=6, mem_len=13), dims(64)).double()
    plain.load_state_dict(layer.state_dict())
    y, want = run(layer, x)[0], run(plain, x)[0]
    assert_same([y, *grads([y], x, layer)], [want, *grads([want], x, plain)])


@pytest.mark.parametrize("compression", LEARNT)
def test_each_loss_trains_its_own_parameters(compression: str) -> None:
    layer, x = make(compression, segment=6, mem_len=6, comp_len=3, rate=3), data(40)
    y, losses, _ = run(layer, x)
    assert losses[0] is None  # nothing has fallen out yet
    names = ["x", *(name for name, _ in layer.named_parameters())]
    loss = torch.stack([loss for loss in losses if loss is not None]).sum()
    for root, trains_compressor in ((loss, True), (y, False)):
        for name, grad in zip(names, grads([root], x, layer), strict=True):
            assert bool(grad.ne(0).any()) == (name.startswith("compressor.") == trains_compressor), name


@pytest.mark.parametrize("compression", ["mean", "max", "most_used"])
def test_what_learns_nothing_has_no_loss(compression: str) -> None:
    assert run(make(compression, segment=4, mem_len=4), data(20))[1] == [None] * 5


def test_no_loss_without_gradients() -> None:
    layer = make(segment=4, mem_len=4)
    with torch.no_grad():
        assert run(layer, data(20))[1] == [None] * 5


def test_a_perfect_compression_has_no_loss() -> None:
    layer = make("conv", segment=4, mem_len=4, comp_len=8, rate=1)
    torch.nn.init.eye_(layer.compressor.get_parameter("pool.weight"))
    losses = [loss for loss in run(layer, data(20))[1] if loss is not None]
    assert len(losses) == 4
    assert max(losses) < 1e-20


@pytest.mark.parametrize("compression", NAMES)
@pytest.mark.parametrize(("segment", "mem_len", "rate"), [(6, 6, 3), (5, 7, 3), (7, 2, 4)])
def test_sizes_are_those_announced(compression: str, segment: int, mem_len: int, rate: int) -> None:
    layer = make(compression, segment=segment, mem_len=mem_len, comp_len=4, rate=rate)
    for tokens in range(1, 30):
        state = run(layer, data(tokens, 2))[2][-1]
        assert mem_len >= tokens or mem_len <= state.memory.shape[1] < mem_len + rate
        assert not any(t.requires_grad for t in state if t is not None)


def test_usage_is_the_mean_attention_received() -> None:
    layer, x = make("most_used", segment=4, mem_len=8), data(8, 2)
    state = run(layer, x)[2][-1]
    assert state.usage is not None
    # the weights of each query sum to 1
    torch.testing.assert_close(state.usage.sum(dim=1), torch.full((2,), 8.0, dtype=torch.float64))


class Undetached(Compressive):
    """Memories that gradients pass through, to see what was read."""

    def _advance(self, x: Tensor, state: State, received: Tensor | None) -> tuple[State, int, Tensor | None]:
        held = torch.cat([state.memory, x], dim=1)
        fallen = self.rule.falls(state.memory.shape[1], x.shape[1])
        queue = state.compressed
        if fallen:
            queue = torch.cat([queue, self.compressor(held[:, :fallen], None)], dim=1)
        queue = queue[:, max(0, queue.shape[1] - self.config.comp_len) :]
        return State(held[:, fallen:], queue, None), fallen, None


@pytest.mark.parametrize("compression", ["mean", "conv", "dilated_conv"])
@pytest.mark.parametrize("sizes", [(4, 4, 2, 2), (5, 4, 3, 3), (6, 3, 2, 4)])
def test_pattern_is_what_is_read(compression: str, sizes: tuple[int, ...]) -> None:
    tokens, knobs = 31, dict(zip(("segment", "mem_len", "comp_len", "rate"), sizes, strict=True))
    layer = make(compression, **knobs)
    open_ = Undetached(layer.config, dims(64)).double()
    open_.load_state_dict(layer.state_dict())
    x = data(tokens, batch=tokens)
    torch.testing.assert_close(run(open_, x)[0], run(layer, x)[0])
    own = run(open_, x)[0][torch.arange(tokens), torch.arange(tokens)]  # of sequence t, the output at t
    (grad,) = torch.autograd.grad(own.sum(), x)
    assert torch.equal(grad.ne(0).any(dim=-1), layer.attention_mask(tokens, causal=True))


def test_what_content_decides_has_no_pattern() -> None:
    assert make("most_used").attention_mask(8, causal=True) is None


# the gates


@pytest.mark.parametrize("compression", NAMES)
@pytest.mark.parametrize(
    ("tokens", "knobs"),
    [
        (1, {}),
        (45, {"segment": 8, "mem_len": 8, "comp_len": 4}),
        (45, {"segment": 9, "mem_len": 5, "rate": 3}),
    ],
)
def test_gates(compression: str, tokens: int, knobs: dict[str, int]) -> None:
    config = CompressiveConfig(compression=compression, **knobs)
    size = dims(tokens, batch=3, channels=32)
    if tokens > 2:
        assert gates.leak(Compressive, config, size, 2, CPU) == 0
    assert gates.reference_error(Compressive, config, size, 0, CPU, causal=True) < 1e-5


@pytest.mark.parametrize("at_once", [1, "all"])
@pytest.mark.parametrize("compression", NAMES)
def test_dispatched_flops(compression: str, at_once: Any) -> None:
    size = dims(1000, batch=2, channels=64, heads=4)
    layer = Compressive(CompressiveConfig(compression=compression, segments_at_once=at_once), size)
    with CountFlops() as counted, torch.no_grad():
        run(layer, torch.randn(2, 1000, 64))
    formula = layer.cost(replace(size, causal=True))
    assert gates.cost_ratio(counted.total, formula, layer.flop_overhead_reason) < 1.4


@pytest.mark.parametrize("at_once", [1, "all"])
@pytest.mark.parametrize("compression", NAMES)
def test_training_dispatches_the_reconstruction_besides(compression: str, at_once: Any) -> None:
    size = dims(1000, batch=2, channels=64, heads=4)
    layer = Compressive(CompressiveConfig(compression=compression, segments_at_once=at_once), size)
    x, found = torch.randn(2, 1000, 64), []
    for training in (False, True):
        with CountFlops() as counted, torch.set_grad_enabled(training):
            run(layer, x)
        found.append(counted.total)
    assert found[1] - found[0] == layer.reconstruction_flops(size)
    assert (layer.reconstruction_flops(size) > 0) == (compression in LEARNT)
    assert ("reconstruction" in str(layer.flop_overhead_reason)) == (compression in LEARNT)


@pytest.mark.parametrize("compression", NAMES)
def test_runs_on_fake_tensors(compression: str) -> None:
    with FakeTensorMode():
        layer = Compressive(CompressiveConfig(compression=compression), dims(2**20, channels=256, heads=4))
        x = torch.randn(1, 1024, 256, requires_grad=True)
        y, losses, _ = run(layer, x)
        torch.autograd.backward([y.sum(), *(loss for loss in losses if loss is not None)])
        assert y.shape == x.shape


# the whole model


def language_model(activations: str, **knobs: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelSpec.of(
            Compressive,
            CompressiveConfig(segment=16, mem_len=16, comp_len=8, **knobs),
            feed_forward=feed_forward(mult=2),
        ),
        dims(75, batch=3, channels=16),
        depth=2,
        dropout=0.1,
        vocabulary=11,
        activations=activations,
    )


def batch() -> Batch:
    torch.manual_seed(3)
    tokens = torch.randint(0, 11, (3, 76))
    return Batch(tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("compression", NAMES)
def test_training_with_recomputation_gives_the_same_gradients(compression: str) -> None:
    found = []
    for activations in ("keep", "checkpoint"):
        model = language_model(activations, compression=compression)
        torch.manual_seed(4)
        training_step(model, optimizer_for(model, 1e-3), batch(), causal=True)
        found.append([parameter.grad for parameter in model.parameters()])
    for kept, replayed in zip(*found, strict=True):
        assert kept is not None
        torch.testing.assert_close(kept, replayed)


def test_training_lowers_the_reconstruction_loss() -> None:
    model = language_model("keep")
    optimizer = optimizer_for(model, 1e-2)
    given_ = batch()

    def loss() -> float:
        model.eval()
        outs = [out.aux_losses for _, out in model.stream(given_.inputs, causal=True)]
        return sum(float(one.detach()) for losses in outs for one in losses)

    # everything else stands still, so that what is to be reconstructed does not change
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("compressor" in name or name == "head.weight")
    before = loss()
    for _ in range(20):
        training_step(model, optimizer, given_, causal=True)
    assert loss() < 0.7 * before


def test_evaluates() -> None:
    quality = evaluate(
        language_model("keep"),
        [batch()],
        objective="clm",
        words_per_byte=0.2,
        unigram_nats=torch.ones(11).double().numpy(),
        device=CPU,
    )
    assert quality.tokens == 3 * 75
    assert 1 < quality.nll < 4


@pytest.mark.parametrize(
    ("knob", "value"),
    [("segment", 0), ("mem_len", -1), ("comp_len", -1), ("rate", 0), ("compression", "median")],
)
def test_bad_knobs_are_refused_by_name(knob: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{knob}={value!r}"):
        CompressiveConfig(**{knob: value})
