"""Reformer: hashing, windows of the sorted order, and the rounds' union against the oracle."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bench.gates import COST_LIMIT, LEAK_TOLERANCE, GateFailed, leak, reference_error
from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from variants import _lsh, patterns
from variants._lsh import Window, factors, hash_rows, rotations, sort_rows, unit
from variants._lsh_attention import LshAttention
from variants._pieces import Sizes
from variants.base import Dims
from variants.layers import masked_attention
from variants.reformer import Reformer, ReformerConfig

SMALL: list[dict[str, Any]] = [
    {"chunk": 8, "n_hashes": 2},
    {"chunk": 8, "n_hashes": 2, "neighbourhood": "chunk"},
]

CPU = torch.device("cpu")
HEADS, WIDTH = 2, 16


def made(seq_len: int = 50, dtype: torch.dtype = torch.float64, **knobs: Any) -> Reformer:
    """A layer whose outputs are of order 1."""
    torch.manual_seed(0)
    dims = Dims(batch_size=1, seq_len=seq_len, d_model=WIDTH, heads=HEADS)
    layer = Reformer(ReformerConfig(**knobs), dims)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    return layer.to(dtype)


def inputs(batch: int, seq_len: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(batch, seq_len, WIDTH, dtype=dtype, requires_grad=True)


def with_gradients(layer: Reformer, x: Tensor, y: Tensor) -> list[Tensor]:
    torch.manual_seed(9)
    direction = torch.randn_like(y)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], direction, materialize_grads=True)]


def run(layer: Reformer, x: Tensor, *, causal: bool, seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    return with_gradients(layer, x, layer(x, causal=causal).y)


def oracle(layer: Reformer, x: Tensor, *, causal: bool, seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    return with_gradients(layer, x, layer.reference(x, causal=causal))


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def dense_shared(layer: Reformer, x: Tensor, *, causal: bool) -> Tensor:
    """Every token reads all others that it may, and itself only where there are none."""
    seq_len = x.shape[1]
    qk = layer._split(layer.qk(x)).transpose(1, 2)
    key = qk / qk.norm(dim=-1, keepdim=True)
    value = layer._heads(layer.value(x)).transpose(1, 2)
    allowed = patterns.matrix(patterns.causal if causal else patterns.anything, seq_len)
    allowed &= ~torch.eye(seq_len, dtype=torch.bool)
    allowed |= torch.eye(seq_len, dtype=torch.bool) & ~allowed.any(-1, keepdim=True)
    return layer.out(masked_attention(qk, key, value, allowed).transpose(1, 2).flatten(2))


# ------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
@pytest.mark.parametrize("seq_len", [1, 2, 33])
def test_one_bucket_and_a_chunk_over_all_is_dense_attention(
    seq_len: int, neighbourhood: str, causal: bool
) -> None:
    layer = made(chunk=40, n_buckets=1, neighbourhood=neighbourhood)
    x = inputs(3, seq_len)
    want = with_gradients(layer, x, dense_shared(layer, x, causal=causal))
    assert_same(run(layer, x, causal=causal), want)


@settings(max_examples=60, deadline=None)
@given(
    seq_len=st.integers(1, 45),
    batch=st.sampled_from([1, 3]),
    chunk=st.integers(1, 20),
    n_hashes=st.integers(1, 4),
    n_buckets=st.sampled_from([None, 1, 2, 6, 68]),
    neighbourhood=st.sampled_from(["band", "chunk"]),
    causal=st.booleans(),
    tile=st.sampled_from([1, 60, 2**19]),
)
def test_equals_the_oracle_on_the_union_of_the_rounds(
    seq_len: int, batch: int, causal: bool, tile: int, **knobs: Any
) -> None:
    layer, x = made(**knobs), inputs(batch, seq_len)
    with pytest.MonkeyPatch.context() as patch:  # a piece of one block, of a few, of all
        patch.setattr(_lsh, "TILE", Sizes(tile, tile))
        patch.setattr(_lsh, "HASH_TILE", Sizes(40 * tile, 40 * tile))
        got = run(layer, x, causal=causal)
    assert_same(got, oracle(layer, x, causal=causal))


def test_a_pair_that_all_rounds_read_counts_once() -> None:
    """Tokens that are all alike fall in one bucket in every round, so more rounds change nothing."""
    x = torch.randn(1, 1, WIDTH, dtype=torch.float64).expand(1, 30, WIDTH)
    outputs = []
    for n_hashes in (1, 4):
        layer = made(chunk=8, n_hashes=n_hashes, n_buckets=2)
        layer._split = lambda projected, heads=layer._heads: heads(projected)  # type: ignore[method-assign,misc]
        value = inputs(1, 30).detach()
        qk = layer._split(layer.qk(x)).contiguous()
        window = layer._window(30, True)
        buckets = layer._buckets(x, qk.float())
        assert (buckets.diff(dim=-1) == 0).all()
        outputs.append(
            LshAttention.apply(qk, layer._heads(value), *sort_rows(buckets, window, HEADS, 2), window)
        )
    torch.testing.assert_close(*outputs)


def test_error_to_dense_attention_falls_with_rounds() -> None:
    x = inputs(2, 128)
    errors = []
    for n_hashes in (1, 2, 4, 8):
        layer = made(128, chunk=16, n_hashes=n_hashes)
        want = dense_shared(layer, x, causal=False)
        found = []
        for seed in range(6):
            torch.manual_seed(seed)
            found.append((layer(x, causal=False).y - want).square().mean().item())
        errors.append(sum(found) / len(found))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_a_token_with_nothing_else_reads_itself() -> None:
    layer, x = made(chunk=4), inputs(2, 40)
    torch.manual_seed(0)
    y = layer(x, causal=True).y
    torch.testing.assert_close(y[:, 0], layer.out(layer.value(x))[:, 0])


@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
def test_sequences_of_a_batch_do_not_meet(neighbourhood: str) -> None:
    layer, x = made(chunk=8, neighbourhood=neighbourhood), inputs(3, 37)
    torch.manual_seed(0)
    together = layer(x, causal=True).y
    for b in range(3):
        torch.manual_seed(0)
        torch.testing.assert_close(layer(x[b : b + 1], causal=True).y, together[b : b + 1])


def test_gradients_of_the_function_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    qk, value = (torch.randn(1, 7, HEADS, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for band, causal in itertools.product((True, False), repeat=2):
        window = Window.choose(7, 2, band=band, causal=causal)
        buckets = hash_rows(qk, rotations(HEADS, 3, 3, (4,), CPU), 3)
        given = sort_rows(buckets, window, HEADS, 4)
        assert torch.autograd.gradcheck(
            lambda a, b, g=given, w=window: LshAttention.apply(a, b, *g, w), (qk, value)
        )


def test_lengths_that_vary_are_no_trouble() -> None:
    """A vector of 0 has a finite gradient, and scores of hundreds do not overflow or vanish."""
    for size in (0.0, 1e3):
        layer, x = made(dtype=torch.float64, chunk=5), inputs(1, 40)
        with torch.no_grad():
            layer.qk.weight.mul_(size)
        got, want = run(layer, x, causal=True), oracle(layer, x, causal=True)
        assert all(t.isfinite().all() for t in got)
        assert_same(got, want, 1e-6)


# ---------------------------------------------------------------------------------------- hashing


def test_hashing_is_the_argmax_of_both_signs_in_float32() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 30, HEADS, 8)
    given = rotations(HEADS, 8, 3, (4, 6), CPU)
    assert all(r.dtype == torch.float32 for r in given)
    got = hash_rows(x, given, 3)
    for h, r in itertools.product(range(HEADS), range(3)):
        want = torch.zeros(2, 30, dtype=torch.int64)
        for size, rotation in zip((4, 6), given, strict=True):
            y = x[:, :, h] @ rotation[h].unflatten(-1, (3, -1))[:, r]
            want = want * size + torch.cat([y, -y], dim=-1).argmax(-1)
        assert got[r].view(HEADS, 2, 30)[h].equal(want)
    assert hash_rows(torch.zeros_like(x), given, 3).eq(0).all()  # a tie is the first, and positive
    with torch.autocast("cpu", torch.bfloat16):
        assert hash_rows(x, given, 3).equal(got)


@pytest.mark.parametrize("n", [1, 2, 6, 64, 68, 128, 512, 4 * 37, 32768])
def test_buckets_are_products_of_even_factors(n: int) -> None:
    sizes = factors(n)
    product = 1
    for size in sizes:
        assert size % 2 == 0
        product *= size
    assert product == n
    assert len(sizes) == (0 if n == 1 else 1 if n <= 64 else 2)


@given(seq_len=st.integers(1, 2**21), chunk=st.integers(1, 300))
def test_default_buckets_can_be_hashed_and_hold_half_a_chunk(seq_len: int, chunk: int) -> None:
    n = ReformerConfig(chunk=chunk).buckets(seq_len)
    factors(n)
    assert n == 1 if seq_len <= chunk else n >= 2 * seq_len / chunk
    assert n <= 1.5 * (2 * seq_len / chunk) + 2


def test_each_head_and_each_round_hashes_by_itself() -> None:
    """Heads with one and the same weights read different tokens, and so do two forward passes."""
    layer, x = made(128, chunk=4, n_hashes=1, n_buckets=8), inputs(1, 128)
    with torch.no_grad():
        for weight in (layer.qk.weight, layer.value.weight):
            weight[WIDTH // 2 :] = weight[: WIDTH // 2]
        torch.nn.init.eye_(layer.out.weight)
    first, second = (run(layer, x, causal=True, seed=seed)[0] for seed in (1, 2))
    one, other = first.chunk(2, dim=-1)
    assert not torch.allclose(one, other)
    assert not torch.allclose(first, second)


def test_a_vector_and_its_multiples_share_buckets() -> None:
    """Keys and queries differ in length alone, so hashing either is the same."""
    torch.manual_seed(0)
    x = torch.randn(1, 40, HEADS, 8)
    given = rotations(HEADS, 8, 2, (8,), CPU)
    assert hash_rows(unit(x)[0], given, 2).equal(hash_rows(x, given, 2))


# ------------------------------------------------------------------------------------------ gates


@pytest.mark.parametrize("knobs", [{}, {"chunk": 16, "n_hashes": 2}, {"chunk": 10, "n_buckets": 4}])
def test_the_band_sees_no_future(knobs: dict[str, Any]) -> None:
    dims = Dims(batch_size=2, seq_len=230, d_model=32, heads=2)
    assert leak(Reformer, ReformerConfig(**knobs), dims, 2, CPU) <= LEAK_TOLERANCE


def test_the_chunks_of_the_paper_do_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ReformerConfig(chunk=16, neighbourhood="chunk")
    dims = Dims(batch_size=1, seq_len=230, d_model=32, heads=2)
    assert "later tokens" in (Reformer.leak(config) or "")
    assert Reformer.leak(ReformerConfig()) is None
    assert leak(Reformer, config, dims, 1, CPU) > 100 * LEAK_TOLERANCE
    monkeypatch.setattr(Reformer, "leak", classmethod(lambda cls, config: None))
    with pytest.raises(GateFailed):
        leak(Reformer, config, dims, 1, CPU)


@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
def test_float32_equals_the_float64_reference(causal: bool, neighbourhood: str) -> None:
    dims = Dims(batch_size=2, seq_len=333, d_model=32, heads=2)
    config = ReformerConfig(neighbourhood=neighbourhood)
    with torch.random.fork_rng():
        reference_error(Reformer, config, dims, 0, CPU, causal=causal)


@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_len", [64, 256, 1000, 4096])
def test_flops(seq_len: int, causal: bool, neighbourhood: str) -> None:
    dims = Dims(batch_size=2, seq_len=seq_len, d_model=64, heads=2)
    layer = Reformer(ReformerConfig(neighbourhood=neighbourhood), dims)
    with FakeTensorMode(allow_non_fake_inputs=True), CountFlops() as counter, torch.no_grad():
        layer(torch.randn(2, seq_len, 64), causal=causal)
    formula = layer.flops(dims, causal=causal)
    window = layer._window(seq_len, causal)
    wasted = 2 * 4 * 64 * layer.config.rounds(seq_len) * (window.computed - window.admitted)
    assert counter.total == formula.total + wasted
    assert layer.padding
    assert 0.99 <= (counter.total - formula.projections) / formula.attention <= COST_LIMIT


def test_rounds_that_would_all_be_alike_run_once() -> None:
    """One bucket: a second round would read the same pairs again, and pay for them."""
    dispatched = []
    for n_hashes in (1, 4):
        layer = made(chunk=16, n_buckets=1, n_hashes=n_hashes, dtype=torch.float32)
        with CountFlops() as counter, torch.no_grad():
            layer(torch.randn(1, 50, WIDTH), causal=True)
        dispatched.append((counter.total, layer.flops(layer.dims, causal=True)))
    assert dispatched[0] == dispatched[1]


@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_len", "chunk"), [(1, 4), (3, 4), (4, 4), (19, 4), (20, 5)])
def test_admitted_pairs_are_counted_right(seq_len: int, chunk: int, causal: bool, neighbourhood: str) -> None:
    layer = made(chunk=chunk, neighbourhood=neighbourhood)
    allowed = layer._readable(torch.zeros(seq_len, dtype=torch.int64), causal)
    allowed |= torch.eye(seq_len, dtype=torch.bool) & ~allowed.any(-1, keepdim=True)
    assert layer._window(seq_len, causal).admitted == allowed.sum()


# ----------------------------------------------------------------------------- recompute and cost


def test_recomputation_gives_the_same_gradients() -> None:
    layer, x = made(chunk=6), inputs(2, 41)
    torch.manual_seed(3)
    y = checkpoint(lambda x: layer(x, causal=True).y, x, use_reentrant=False)
    assert_same(with_gradients(layer, x, y), run(layer, x, causal=True))


def test_half_precision_hashes_alike_and_is_near() -> None:
    layer, x = made(dtype=torch.float32, chunk=8, n_buckets=1), inputs(1, 50, torch.float32)
    want = run(layer, x, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        y = layer(x, causal=True).y
    assert y.dtype == torch.bfloat16
    got = with_gradients(layer, x, y.float())
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_memory_grows_with_length_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted at two lengths; nothing of size T × rounds × buckets or T × rounds × channels is kept."""
    monkeypatch.setattr(_lsh, "MOST_PIECES", 4)  # fewer calls; larger tiles only raise the peak
    peaks = []
    for seq_len in (2**17, 2**19):
        with FakeTensorMode(), LiveStorage() as storage:
            dims = Dims(batch_size=1, seq_len=seq_len, d_model=256, heads=4)
            layer = Reformer(ReformerConfig(n_hashes=2), dims)
            x, grad = torch.randn(1, seq_len, 256, requires_grad=True), torch.randn(1, seq_len, 256)
            layer(x, causal=True).y.backward(grad)
        peaks.append(storage.peak)
    assert peaks[1] < 4.1 * peaks[0]
    assert peaks[1] / 2**19 <= 24 * 2**30 / 2**20


def test_state() -> None:
    layer = made(chunk=64)
    dims = Dims(batch_size=2, seq_len=1000, d_model=256, heads=4)
    assert layer.state_bytes(dims) == 2 * 1000 * (2 * 256 * 4 + 4 * 4 * 4)
    few = made(chunk=8, n_buckets=2, n_hashes=2)
    assert few.state_bytes(dims) == 2 * (2 * 2 * 8) * (2 * 256 * 4 + 2 * 4 * 4)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("n_hashes", 0),
        ("chunk", 0),
        ("n_buckets", 3),
        ("n_buckets", 0),
        ("n_buckets", 66),
        ("neighbourhood", "ring"),
    ],
)
def test_bad_knobs_are_refused_by_name(knob: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{knob}={value!r}"):
        ReformerConfig(**{knob: value})
