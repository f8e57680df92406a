"""Transformer-XL: what its memory lets a token know, and that the fast attention is the plain one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
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
from variants import load
from variants.attention.transformer_xl import TransformerXL, TransformerXLConfig
from variants.base import Context, Workload
from variants.input_schedule import Chunks, NetworkOut
from variants.ops.segments.recurrent import Recurrent, slide
from variants.ops.segments.relative_attention import BLOCK, _RelativeAttention, plain_attention

SMALL: list[dict[str, Any]] = [
    {"segment": 12, "mem_len": 17},
    {"segment": 8, "mem_len": 11, "segments_at_once": 3},
]

CPU = torch.device("cpu")


def dims(tokens: int, batch: int = 1, channels: int = 8, heads: int = 2) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=channels, heads=heads)


class Undetached(TransformerXL):
    """Memory that gradients pass through, to see what was read."""

    def remember(self, memory: Tensor, x: Tensor) -> Tensor:
        return torch.cat([memory, x], dim=1)[:, max(0, memory.shape[1] + x.shape[1] - self.config.mem_len) :]


def make(segment: int, mem_len: int, cls: type[TransformerXL] = TransformerXL, **sizes: int) -> TransformerXL:
    torch.manual_seed(0)
    layer = cls(TransformerXLConfig(segment=segment, mem_len=mem_len), dims(64, **sizes)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def run(layer: Recurrent, x: Tensor) -> Tensor:
    return layer.input_schedule(layer.config).stream(
        lambda part, state: NetworkOut(*layer(part, Context(causal=True), state)[:2]), x, causal=True
    )


def gradients(y: Tensor, x: Tensor, layer: torch.nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y)))


def data(tokens: int, batch: int = 1, channels: int = 8) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, tokens, channels, dtype=torch.float64, requires_grad=True)


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# the attention of one segment


def operands(batch: int, queries: int, memory: int, head_dim: int = 4, heads: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    keys = memory + queries
    shapes = [
        (heads, batch, queries, head_dim),
        (2, heads, batch, keys, head_dim),
        (heads, head_dim, keys + 1),
        (heads, head_dim),
        (heads, head_dim),
    ]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    ("batch", "queries", "memory"),
    [(1, 1, 0), (3, 1, 5), (3, 7, 0), (2, BLOCK.cpu + 9, 40), (3, 2 * BLOCK.cpu, 3)],
)
def test_blocked_attention_is_the_plain_one(batch: int, queries: int, memory: int) -> None:
    given_ = operands(batch, queries, memory)
    fast, usage = _RelativeAttention.apply(*given_, True, BLOCK.cpu)
    plain, weights = plain_attention(*given_)
    direction = torch.randn_like(plain)
    assert_same([fast, usage], [plain, weights.sum(dim=2).mean(dim=0)])
    assert_same(*(list(torch.autograd.grad(y, given_, direction)) for y in (fast, plain)))


def test_gradcheck() -> None:
    given_ = operands(2, 3, 2, head_dim=2)
    assert torch.autograd.gradcheck(
        lambda *tensors: _RelativeAttention.apply(*tensors, False, BLOCK.cpu)[0], given_
    )


def test_score_has_the_four_terms() -> None:
    q, kv, r, u, v = (t.detach() for t in operands(1, 3, 2))
    _, weights = plain_attention(q, kv, r, u, v)
    for h, i in itertools.product(range(2), range(3)):
        scores = []
        for j in range(2 + i + 1):
            key, position = kv[0, h, 0, j], r[h, :, 5 - (2 + i - j)]  # r holds distances 5, …, 0
            query = q[h, 0, i]
            scores.append(query @ key + query @ position + u[h] @ key + v[h] @ position)
        want = (torch.stack(scores) / 2).softmax(dim=0)
        torch.testing.assert_close(weights[h, 0, i, : len(want)], want)


@pytest.mark.parametrize(("tokens", "segment", "mem_len"), [(1, 4, 3), (11, 4, 3), (9, 2, 5)])
def test_layer_is_the_papers_equations_query_by_query(tokens: int, segment: int, mem_len: int) -> None:
    """Nothing of ours but the weights: sinusoids of the distance, four terms, one key after the other."""
    layer, x, channels, heads = make(segment, mem_len), data(tokens), 8, 2

    def head(matrix: Tensor, vector: Tensor, h: int) -> Tensor:
        return (matrix @ vector).view(heads, -1)[h]

    def sinusoid(distance: int) -> Tensor:
        angles = [distance * 10_000 ** (-2 * i / channels) for i in range(channels // 2)]
        return torch.tensor([f(a) for f in (math.sin, math.cos) for a in angles], dtype=torch.float64)

    w_k, w_v = layer.kv.weight.chunk(2)
    outputs = []
    for i in range(tokens):
        read = []
        for h in range(heads):
            q, scores, values = head(layer.q.weight, x[0, i], h), [], []
            for j in range(max(0, i // segment * segment - mem_len), i + 1):
                k, position = head(w_k, x[0, j], h), head(layer.r.weight, sinusoid(i - j), h)
                scores.append(((q + layer.u[h]) @ k + (q + layer.v[h]) @ position) / math.sqrt(4))
                values.append(head(w_v, x[0, j], h))
            read.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        outputs.append(layer.out.weight @ torch.cat(read))
    torch.testing.assert_close(run(layer, x)[0], torch.stack(outputs))


def test_far_positions_are_told_apart() -> None:
    """Scores of distances alone: at 30,000 an angle that is rounded to float32 is off by thousandths."""
    layer, farthest = make(1, 30_000), 30_000
    with torch.no_grad():
        layer.q.weight.zero_()
        layer.u.zero_()
        layer.v.mul_(40)
    memory, x = data(farthest + 1).detach().split([farthest, 1], dim=1)
    distance = torch.arange(farthest, -1, -1, dtype=torch.float64)[:, None]
    angles = distance * 10_000 ** (torch.arange(4, dtype=torch.float64) / -4)
    r = (torch.cat([angles.sin(), angles.cos()], dim=-1) @ layer.r.weight.T).unflatten(-1, (2, 4))
    weights = (torch.einsum("jhd,hd->hj", r, layer.v) / 2).softmax(-1)
    values = (torch.cat([memory, x], dim=1)[0] @ layer.kv.weight[8:].T).unflatten(-1, (2, 4))
    want = layer.out(torch.einsum("hj,jhd->hd", weights, values).flatten())
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        got = layer.to(dtype)(x.to(dtype), Context(causal=True), state=memory.to(dtype)).y[0, 0]
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_scores_of_great_size_neither_overflow_nor_leak() -> None:
    q, kv, r, u, v = (t.detach() for t in operands(1, 9, 4))
    kv[0, :, :, -1] *= 1e4  # the last key is forbidden to all queries but the last
    y, _ = _RelativeAttention.apply(q, kv, r, u, v, False, BLOCK.cpu)
    torch.testing.assert_close(y, plain_attention(q, kv, r, u, v)[0])


# the identities


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.integers(1, 40),
    segment=st.integers(1, 12),
    mem_len=st.integers(0, 30),
    batch=st.sampled_from([1, 3]),
)
def test_equals_the_reference(tokens: int, segment: int, mem_len: int, batch: int) -> None:
    layer, x = make(segment, mem_len), data(tokens, batch)
    fast, slow = run(layer, x), layer.reference(x, Context(causal=True))
    assert_same([fast, *gradients(fast, x, layer)], [slow, *gradients(slow, x, layer)])


@pytest.mark.parametrize("tokens", [1, 5, 23])
def test_memory_of_everything_is_one_pass(tokens: int) -> None:
    x = data(tokens, 3)
    pieces, whole = make(5, tokens, Undetached), make(tokens, 0)
    got, want = run(pieces, x), whole(x, Context(causal=True)).y
    torch.testing.assert_close(run(make(5, tokens), x), want)  # detached, outputs are the same
    assert_same([got, *gradients(got, x, pieces)], [want, *gradients(want, x, whole)])


def test_no_memory_is_independent_chunks() -> None:
    layer, x = make(5, 0), data(23, 3)
    got = run(layer, x)
    want = (
        Chunks(5, 5).apply(lambda part, _: NetworkOut(layer(part, Context(causal=True)).y), x, causal=True).y
    )
    assert_same([got, *gradients(got, x, layer)], [want, *gradients(want, x, layer)])


@pytest.mark.parametrize(("segment", "mem_len"), [(4, 4), (4, 8), (3, 5), (6, 2)])
def test_reach_grows_by_the_memory_a_layer(segment: int, mem_len: int) -> None:
    tokens = 36
    layers = [make(segment, mem_len, Undetached) for _ in range(3)]
    x = h = data(tokens, batch=tokens)
    allowed = layers[0].attention_mask(tokens, causal=True).double()
    reachable = torch.eye(tokens, dtype=torch.float64)
    for depth, layer in enumerate(layers, start=1):
        h = run(layer, h)
        reachable = (reachable @ allowed > 0).double()
        own = h[torch.arange(tokens), torch.arange(tokens)]  # of sequence t, the output at t
        (grad,) = torch.autograd.grad(own.sum(), x, retain_graph=True)
        seen = grad.ne(0).any(dim=-1)
        assert torch.equal(seen, reachable.bool())
        if mem_len % segment == 0:
            first = (tokens // segment - 1) * segment  # the first token of the last segment
            assert seen[first].nonzero()[0].item() == max(0, first - depth * mem_len)


def test_gradients_stop_at_the_segment() -> None:
    layer, x = make(4, 8), data(12)
    (grad,) = torch.autograd.grad(run(layer, x)[:, 8:].sum(), x)
    assert grad[:, :8].eq(0).all()
    assert grad[:, 8:].ne(0).all()


def test_state_of_a_stream_continues_it() -> None:
    layer, x = make(4, 6), data(14, 3)
    whole, state, pieces = run(layer, x), None, []
    for begin in range(0, 14, 4):
        out = layer(x[:, begin : begin + 4], Context(causal=True), state=state)
        state = out.state
        assert not state.requires_grad
        assert state.shape[1] == min(begin + min(4, 14 - begin), 6)
        pieces.append(out.y)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert not [name for name, value in vars(layer).items() if isinstance(value, Tensor)]


def test_slide_drops_from_the_oldest() -> None:
    memory, x = torch.arange(3.0).view(1, 3, 1), torch.arange(3.0, 5.0).view(1, 2, 1)
    for drop in range(6):
        assert slide(memory, x, drop).flatten().tolist() == list(map(float, range(drop, 5)))


# the gates


@pytest.mark.parametrize(
    ("tokens", "knobs"),
    [
        (1, {}),
        (45, {"segment": 8, "mem_len": 5}),
        (45, {"segment": 64, "mem_len": 0}),
        (45, {"segment": 8, "mem_len": 5, "segments_at_once": "all"}),
        (150, {"segment": 140}),
    ],
)
def test_gates(tokens: int, knobs: dict[str, int]) -> None:
    config = TransformerXLConfig(**knobs)
    size = dims(tokens, batch=3, channels=32)
    if tokens > 2:
        assert gates.leak(TransformerXL, config, size, 2, CPU) == 0
    assert gates.reference_error(TransformerXL, config, size, 0, CPU, causal=True) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "segment", "mem_len", "at_once", "most"),
    [
        (1000, 256, 256, 1, 1.4),
        (700, 512, 512, 1, 1.5),
        (300, 40, 200, 1, 1.2),
        (1000, 256, 256, "all", 1.4),
        (300, 40, 200, 3, 1.2),
    ],
)
def test_dispatched_flops(tokens: int, segment: int, mem_len: int, at_once: Any, most: float) -> None:
    size = dims(tokens, batch=2, channels=64, heads=4)
    config = TransformerXLConfig(segment=segment, mem_len=mem_len, segments_at_once=at_once)
    layer = TransformerXL(config, size)
    with CountFlops() as counted, torch.no_grad():
        run(layer, torch.randn(2, tokens, 64))
    formula = layer.cost(replace(size, causal=True))
    assert gates.cost_ratio(counted.total, formula, layer.flop_overhead_reason) < most


def test_flops_are_exact_where_nothing_is_masked() -> None:
    size = dims(40, batch=2, channels=64, heads=4)  # segments of one token
    layer = TransformerXL(TransformerXLConfig(segment=1, mem_len=16), size)
    with CountFlops() as counted, torch.no_grad():
        run(layer, torch.randn(2, 40, 64))
    # the view of the scores costs one distance more than there are keys
    assert counted.total == pytest.approx(layer.cost(replace(size, causal=True)).total, rel=0.03)


def test_pattern() -> None:
    layer = make(4, 3)
    pattern = layer.attention_mask(10, causal=True)
    assert [row.nonzero().flatten().tolist()[0] for row in pattern] == [0, 0, 0, 0, 1, 1, 1, 1, 5, 5]
    assert pattern.tril().equal(pattern)
    assert pattern.diagonal().all()


def test_runs_on_fake_tensors() -> None:
    tokens, segment = 2**20, 2**19  # few and long: what is fake costs by the operation
    with FakeTensorMode():
        config = TransformerXLConfig(segment=1024, mem_len=segment)
        layer = TransformerXL(config, dims(tokens, channels=256, heads=4))
        state = layer.remember(torch.randn(1, 0, 256), torch.randn(1, segment, 256))
        x = torch.randn(1, 1024, 256, requires_grad=True)
        out = layer(x, Context(causal=True), state=state)
        out.y.sum().backward()
        assert out.y.shape == (1, 1024, 256)
        assert out.state.shape == (1, segment, 256)


# the whole model


def language_model(variant: str, activations: str, dropout: float = 0.0, **knobs: Any) -> LanguageModel:
    torch.manual_seed(0)
    cls = load(variant)
    return LanguageModel(
        ModelSpec.of(cls, cls.Config(**knobs), feed_forward=feed_forward(mult=2)),
        dims(50, batch=3, channels=16),
        depth=2,
        dropout=dropout,
        vocabulary=11,
        activations=activations,
    )


def test_training_with_recomputation_gives_the_same_gradients() -> None:
    torch.manual_seed(3)
    tokens = torch.randint(0, 11, (3, 51))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    found = []
    for activations in ("keep", "checkpoint"):
        model = language_model("transformer_xl", activations, dropout=0.1, segment=16, mem_len=16)
        torch.manual_seed(4)
        training_step(model, optimizer_for(model, 1e-3), batch, causal=True)
        found.append([parameter.grad for parameter in model.parameters()])
    for kept, replayed in zip(*found, strict=True):
        torch.testing.assert_close(kept, replayed)


def test_evaluation_carries_memory_across_segments() -> None:
    torch.manual_seed(3)
    tokens = torch.randint(0, 11, (3, 51))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    nll = {}
    for segment, mem_len in ((50, 0), (16, 50), (16, 0)):
        model = language_model("transformer_xl", "keep", segment=segment, mem_len=mem_len)
        found = evaluate(
            model,
            [batch],
            objective="clm",
            words_per_byte=0.2,
            unigram_nats=torch.ones(11).double().numpy(),
            device=CPU,
        )
        nll[segment, mem_len] = found.nll
    assert nll[16, 50] == pytest.approx(nll[50, 0], abs=1e-6)
    assert abs(nll[16, 0] - nll[50, 0]) > 1e-6


def test_autocast_runs_and_is_near() -> None:
    torch.manual_seed(0)
    layer, x = TransformerXL(TransformerXLConfig(segment=16, mem_len=16), dims(40)), torch.randn(3, 40, 8)
    want = run(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(layer, x)
    got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("knob", "value"), [("segment", 0), ("mem_len", -1), ("segments_at_once", 0)])
def test_bad_knobs_are_refused_by_name(knob: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{knob}={value}"):
        TransformerXLConfig(**{knob: value})


def test_what_it_cannot_do() -> None:
    config = TransformerXLConfig()
    assert TransformerXL.unsupported(config, dims(8), causal=True) is None
    assert TransformerXL.unsupported(config, dims(8), causal=False) == "has no bidirectional form"
    assert "d_model=9" in str(TransformerXL.unsupported(config, dims(8, channels=9, heads=3), causal=True))
