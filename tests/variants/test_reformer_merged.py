"""Reformer with all rounds at once: matrix products and FlexAttention, against the reference.

FlexAttention refuses to compute gradients on a CPU. Without the refusal, its uncompiled form computes
outputs, logsumexp and gradients of all P × P scores, with the mask and the score modification. What needs the
compiled kernel is in tests/test_cuda.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reformer import (
    HEADS,
    NUMBERS,
    POISONS,
    WIDTH,
    assert_same,
    inputs,
    made,
    oracle,
    poisoned,
    run,
    stacked,
    with_gradients,
)
from tiers import slow
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure.flops import CountFlops
from bench.measure.gates import COST_LIMIT
from bench.tools.launches import accelerator_spec, launches_a_layer, plan
from variants.attention.reformer import Reformer, ReformerConfig
from variants.base import Context, Workload
from variants.ops.lsh import flex, merged, products
from variants.ops.lsh.flex import FlexRounds
from variants.ops.lsh.hashing import hash_rows, rotations
from variants.ops.lsh.layout import lay_out, margin
from variants.ops.lsh.merged import merged_attention
from variants.ops.lsh.windows import Window

CPU = torch.device("cpu")
both_directions = pytest.mark.parametrize("causal", [True, False])
both_neighbourhoods = pytest.mark.parametrize("neighbourhood", ["band", "chunk"])


@pytest.fixture
def _gradients_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "missing_flex", lambda *_: None)
    yield
    flex._compiled.cache_clear()
    torch._dynamo.reset()


# --- the mathematics ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seq_len=st.integers(1, 45),
    batch=st.sampled_from([1, 3]),
    chunk=st.integers(1, 20),
    n_hashes=st.integers(1, 4),
    n_buckets=st.sampled_from([None, 1, 2, 6, 68]),
    neighbourhood=st.sampled_from(["band", "chunk"]),
    causal=st.booleans(),
    pairs=st.sampled_from([1, 5000, 2**28]),
)
def test_products_equal_the_oracle(seq_len: int, batch: int, causal: bool, pairs: int, **knobs: Any) -> None:
    layer, x = made(impl="merged", **knobs), inputs(batch, seq_len)
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # a sequence at a time, some, or all; fewer in the backward pass
        patch.setattr(products, "PAIRS", (pairs, pairs // 2))
        got = run(layer, x, causal=causal)
    assert_same(got, oracle(layer, x, causal=causal))


FLEX: list[Any] = [
    (45, 3, {"chunk": 5, "n_buckets": 6, "n_hashes": 3}),
    *slow(
        (1, 2, {"chunk": 4, "n_buckets": 2}),
        (45, 1, {"chunk": 50, "n_buckets": 1}),
        (301, 1, {"chunk": 40, "n_buckets": 6, "n_hashes": 2}),
    ),
]


@pytest.mark.usefixtures("_gradients_on_a_cpu")
@pytest.mark.parametrize("numbers", [1, *slow(2**28)])
@pytest.mark.parametrize(("seq_len", "batch", "knobs"), FLEX, ids=str)
@both_neighbourhoods
@both_directions
def test_flex_equals_the_oracle(
    seq_len: int,
    batch: int,
    knobs: dict[str, Any],
    neighbourhood: str,
    causal: bool,
    numbers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flex, "NUMBERS", (numbers, numbers))
    layer = made(max(seq_len, 50), impl="flex", neighbourhood=neighbourhood, **knobs)
    x = inputs(batch, seq_len)
    assert_same(run(layer, x, causal=causal), oracle(layer, x, causal=causal))


def attend(impl: str, layer: Reformer, qk: Tensor, value: Tensor, causal: bool) -> Tensor:
    matrices = rotations(HEADS, WIDTH // HEADS, layer.rounds, (8,), CPU, 0)
    buckets = hash_rows(qk.detach(), matrices, layer.rounds)
    return layer.IMPLS[impl].run(layer, qk, value, buckets, causal)


@both_directions
def test_vectors_of_any_length_have_the_gradients_of_the_plain_form(causal: bool) -> None:
    """A vector of 0 has a finite gradient, and scores of hundreds do not overflow or vanish."""
    for size in (0.0, 1e3):
        layer, x = made(impl="merged", chunk=5), inputs(1, 40)
        with torch.no_grad():
            layer.qk.weight.mul_(size)
        got = run(layer, x, causal=causal)
        assert all(t.isfinite().all() for t in got)
        assert_same(got, oracle(layer, x, causal=causal), 1e-6)


def test_half_precision_is_near() -> None:
    """Compared with the plain form in float32: products are of bfloat16, sums are float32."""
    plain, layer = (made(300, torch.float32, chunk=16, n_buckets=8, impl=i) for i in ("plain", "merged"))
    x = inputs(2, 300, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        y = layer(x, Context(causal=True)).y
        torch.manual_seed(3)
        want = plain(x, Context(causal=True)).y
    assert y.dtype == torch.bfloat16
    for a, b in zip(with_gradients(layer, x, y.float()), with_gradients(plain, x, want.float()), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of deprecations within torch
def test_compiled_it_is_the_same() -> None:
    layer, x = made(60, impl="merged", chunk=6).eval(), inputs(2, 41)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    try:
        got = with_gradients(layer, x, compiled(x, Context(causal=True)).y)
    finally:
        torch._dynamo.reset()
    assert_same(got, run(layer, x, causal=True))


# --- nothing reaches a token that it may not read ---------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("seq_len", "knobs"),
    [(257, {"chunk": 10}), (63, {"n_buckets": 60}), *slow((1000, {}), (130, {"n_buckets": 16, "chunk": 7}))],
    ids=str,
)
def test_no_bit_of_an_output_depends_on_a_later_token(seq_len: int, knobs: dict[str, Any], name: str) -> None:
    """Four layers deep, where one bit can change a bucket; later tokens change little, much, or to NaN."""
    torch.manual_seed(0)
    run = stacked(seq_len, name, impl="merged", **knobs)
    x = torch.randn(2, seq_len, WIDTH, dtype=NUMBERS[name])
    before = run(x)
    sizes = itertools.cycle((1.0, 1e-2, 1e6, math.inf, math.nan))
    for cut in (1, seq_len // 2 + 1, seq_len - 1):
        for where in (slice(cut, None), slice(cut, cut + 1)):
            changed = x.clone()
            changed[:, where] += next(sizes) * torch.randn_like(changed[:, where])
            assert run(changed)[:, :cut].equal(before[:, :cut]), (cut, where)


@pytest.mark.parametrize("poison", [1e24, *slow(*(p for p in POISONS if p != 1e24 and p == p)), math.nan])
@both_directions
@both_neighbourhoods
def test_sequences_of_a_batch_do_not_reach_each_other(
    neighbourhood: str, causal: bool, poison: float
) -> None:
    """Whatever another one holds, and whatever gradient it gets, no bit of an output or gradient moves."""
    layer = made(50, torch.float32, chunk=6, n_buckets=8, neighbourhood=neighbourhood).eval()
    torch.manual_seed(0)
    qk, value = torch.randn(2, 3, 50, HEADS, WIDTH // HEADS).unbind()
    direction = torch.randn_like(value)
    want: list[Tensor] = []
    for of_qk, of_value, of_grad in itertools.product((False, True), repeat=3):
        a = poisoned(qk, (1,), poison if of_qk else 1.0)
        b = poisoned(value, (1,), poison if of_value else 1.0)
        y = attend("merged", layer, a, b, causal)
        grads = torch.autograd.grad(y, [a, b], poisoned(direction, (1,), poison if of_grad else 1.0))
        got = [t.detach()[::2] for t in (y, *grads)]
        want = want or got
        assert all(one.equal(other) for one, other in zip(got, want, strict=True))
        assert all(t.isfinite().all() for t in got)
        if (of_qk or of_value) and not math.isfinite(poison):
            assert y[1].isnan().all()


@both_directions
@both_neighbourhoods
@pytest.mark.parametrize("impl", ["merged", "flex"])
def test_the_tokens_that_read_a_lost_one_are_lost_and_no_others(
    impl: str, neighbourhood: str, causal: bool
) -> None:
    layer = made(60, torch.float32, chunk=5, n_buckets=8, neighbourhood=neighbourhood).eval()
    torch.manual_seed(0)
    qk, value = torch.randn(2, 1, 60, HEADS, WIDTH // HEADS).unbind()
    buckets = hash_rows(qk, rotations(HEADS, WIDTH // HEADS, layer.rounds, (8,), CPU, 0), layer.rounds)
    reads = layer._readable(buckets, causal).any(0)  # (H, T, T)
    for at in (0, 13, 59):
        with torch.no_grad():
            y = attend(impl, layer, qk, poisoned(value, (0, at), math.nan), causal)[0].transpose(0, 1)
        want = reads[:, :, at] | (torch.arange(60) == at)
        assert y.isnan().any(-1).equal(want)
        assert y.isnan().all(-1).equal(want)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_lost_token_without_a_gradient_gets_none(poison: float) -> None:
    """As in the plain form, also if it is NaN."""
    layer = made(50, torch.float32, chunk=6, n_buckets=8).eval()
    torch.manual_seed(0)
    qk, value = torch.randn(2, 1, 50, HEADS, WIDTH // HEADS).unbind()
    results = []
    for impl in ("merged", "plain"):
        a, b = poisoned(qk, (0, 49), poison), poisoned(value, (0, 49), 1.0)
        y = attend(impl, layer, a, b, True)
        results.append(torch.autograd.grad(y[:, :49].square().sum(), [a, b]))
    for got, want in zip(*results, strict=True):
        assert got[0, 49].eq(0).all()
        torch.testing.assert_close(got, want)


# --- the sorted orders and their tiles --------------------------------------------------------------


@given(
    seq_len=st.integers(1, 300),
    n_buckets=st.sampled_from([1, 2, 8]),
    chunk=st.integers(1, 70),
    band=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_every_token_has_a_position_and_every_bucket_of_the_band_begins_a_tile(
    seq_len: int, n_buckets: int, chunk: int, band: bool
) -> None:
    torch.manual_seed(seq_len)
    window = Window.choose(seq_len, n_buckets, chunk, band=band, causal=True).in_blocks(flex.KEYS)
    buckets = torch.randint(n_buckets, (3, 2, seq_len))
    excluded = torch.zeros(2 * seq_len, dtype=torch.bool)
    layout = lay_out(buckets, window, excluded, FlexRounds.multiple)
    positions = layout.positions(window)
    assert positions % FlexRounds.multiple == 0
    order = layout.order[margin(window) : len(layout.order) - margin(window)].view(2, 3, positions)
    for n, r in itertools.product(range(2), range(3)):
        place = layout.place[n, r] - (3 * n + r) * positions
        assert order[n, r][place].equal(torch.arange(seq_len, dtype=torch.int32) + n * seq_len)
        assert int((order[n, r] < 2 * seq_len).sum()) == seq_len
        for bucket in buckets[r, n].unique() if band else ():
            of_bucket = place[buckets[r, n] == bucket]
            assert of_bucket[0] % flex.KEYS == 0
            assert of_bucket.diff().eq(1).all()


@both_directions
@pytest.mark.parametrize("band", [True, False])
@pytest.mark.parametrize("chunk", [1, 64, 100, 300])
def test_tiles_are_those_with_positions_that_queries_may_read(chunk: int, band: bool, causal: bool) -> None:
    positions = 5 * flex.BLOCK
    window = Window.choose(positions, 2, chunk, band=band, causal=causal).in_blocks(flex.KEYS)
    query = torch.arange(positions)
    low, high = window.span(query)
    reads = (query >= low[:, None]) & (query < high[:, None])
    want = reads.unflatten(0, (5, -1)).unflatten(2, (5, -1)).any(3).any(1)
    found = flex.tiles(window, positions, CPU)
    for number, index, matrix in (
        (found.keys, found.key_index, want),
        (found.queries, found.query_index, want.T),
    ):
        for tile in range(5):
            listed = index[0, 0, tile, : int(number[0, 0, tile])].long()
            assert listed.equal(matrix[tile].nonzero().flatten())
    assert flex._count_pairs(window.numbers, positions) == int(want.sum()) * flex.BLOCK**2


# --- what is counted ------------------------------------------------------------------------------


@both_neighbourhoods
@both_directions
@pytest.mark.parametrize("seq_len", [256, 1000])
def test_flops_of_products(seq_len: int, causal: bool, neighbourhood: str) -> None:
    dims = Workload(causal=True, batch_size=2, seq_len=seq_len, d_model=64, heads=2)
    layer = Reformer(ReformerConfig(neighbourhood=neighbourhood, impl="merged"), dims)
    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode(allow_non_fake_inputs=True), CountFlops() as counter, torch.no_grad():
            x = torch.randn(2, seq_len, 64)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                layer(x, Context(causal=causal))
        formula = layer.cost(replace(dims, causal=causal))
        window = layer._window(seq_len, causal).in_whole_blocks()
        wasted = 2 * 4 * 64 * layer.rounds * (window.computed - window.admitted)
        assert counter.total == formula.total + wasted
        assert 0.99 <= (counter.total - formula.tokenwise) / formula.mixing <= COST_LIMIT


def test_flops_of_flex_are_those_of_its_tiles() -> None:
    """The passes of a layer on fake tensors; 4·D for each pair forward, and 18·D backward."""
    dims = Workload(causal=True, batch_size=2, seq_len=1000, d_model=64, heads=2, device_type="cuda")
    layer = Reformer(ReformerConfig(impl="flex"), dims)
    cost = layer.cost(dims)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 1000, 64, requires_grad=True)
        with CountFlops() as forward:
            y = layer(x, Context(causal=True)).y
        with CountFlops() as backward:
            y.sum().backward()
    window = layer._window(1000, True).in_blocks(flex.KEYS)
    tiles = -(-window.padded // flex.BLOCK)
    pairs = 2 * 2 * 4 * (2 * tiles - 1) * flex.BLOCK**2  # a tile of queries reads its own and the one before
    hashing = cost.total - sum(part for name, part in cost.parts.items() if name != "hashing")
    assert forward.total == cost.parts["projections"] + hashing + 4 * 32 * pairs
    assert backward.total == 2 * cost.parts["projections"] + 18 * 32 * pairs


@pytest.mark.parametrize("seq_len", [1024, *slow(4096, 65536)])
def test_flex_is_planned_without_a_device_below_the_ceiling(seq_len: int) -> None:
    planned = plan(accelerator_spec("reformer", seq_len, params={"impl": "flex"}, depth=2))
    assert launches_a_layer(planned) <= 300


# --- which form runs ------------------------------------------------------------------------------


def test_auto_is_the_plain_form_on_a_cpu_and_all_rounds_at_once_elsewhere() -> None:
    config = ReformerConfig()
    assert [Reformer.resolve_impl(config, kind) for kind in ("cpu", "cuda", "xpu")] == [
        "plain",
        "merged",
        "merged",
    ]
    assert Reformer.IMPLS["flex"].untried


def test_flex_is_missing_on_a_cpu_and_planned_there() -> None:
    config = ReformerConfig(impl="flex")
    dims = Workload(causal=True, batch_size=1, seq_len=64, d_model=64, heads=2)
    reason = Reformer.missing(config, dims, device=CPU, dtype=torch.float32)
    assert reason == "impl=flex needs a CUDA device: FlexAttention has no backward pass on cpu"
    planned = replace(dims, device_type="cuda")
    assert Reformer.missing(config, planned, device=CPU, dtype=torch.float32) is None


def test_gradients_of_flex_on_a_cpu_are_refused() -> None:
    layer, x = made(30, torch.float32, impl="flex"), inputs(1, 30, torch.float32)
    y = layer(x, Context(causal=True)).y
    with pytest.raises(NotImplementedError, match="impl=flex needs a CUDA device"):
        y.sum().backward()


def test_pieces_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PAIRS", (1, 1))
    monkeypatch.setattr(merged, "MOST_PIECES", 3)
    window = Window.choose(20, 2, 4, band=True, causal=True).in_whole_blocks()
    buckets = torch.zeros(1, 10, 20, dtype=torch.int64)
    layout = lay_out(buckets, window, torch.zeros(200, dtype=torch.bool))
    pieces = list(merged._pieces(layout, window, "merged", 8, backward=True))
    assert [(piece.first, piece.end) for piece in pieces] == [(0, 4), (4, 8), (8, 10)]
    qk, value = torch.randn(2, 5, 20, 2, 8).unbind()
    merged_attention(qk, value, buckets, window, "merged")
