"""Reformer: hashing, windows of the sorted order, and the rounds' union against the oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import slow
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bench.measure.flops import CountFlops
from bench.measure.gates import COST_LIMIT, LEAK_TOLERANCE, GateFailed, leak, reference_error
from bench.measure.memory import LiveStorage
from variants.attention.reformer import Reformer, ReformerConfig
from variants.base import Context, Workload
from variants.ops.lsh import hashing, windows
from variants.ops.lsh.attention import LshAttention
from variants.ops.lsh.hashing import factors, hash_rows, inverse_length, least_buckets, rotations
from variants.ops.lsh.windows import Window
from variants.ops.patterns import masks
from variants.ops.projections import masked_attention
from variants.ops.tile_size import Sizes

SMALL: list[dict[str, Any]] = [
    {"chunk": 8, "n_hashes": 2},
    {"chunk": 8, "n_hashes": 2, "neighbourhood": "chunk"},
]

CPU = torch.device("cpu")
HEADS, WIDTH = 2, 16


def made(seq_len: int = 50, dtype: torch.dtype = torch.float64, **knobs: Any) -> Reformer:
    """A layer whose outputs are of order 1."""
    torch.manual_seed(0)
    dims = Workload(causal=True, batch_size=1, seq_len=seq_len, d_model=WIDTH, heads=HEADS)
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
    return with_gradients(layer, x, layer(x, Context(causal=causal)).y)


def oracle(layer: Reformer, x: Tensor, *, causal: bool, seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    return with_gradients(layer, x, layer.reference(x, Context(causal=causal)))


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def dense_shared(layer: Reformer, x: Tensor, *, causal: bool) -> Tensor:
    """Every token reads all others that it may, and itself only where there are none."""
    seq_len = x.shape[1]
    qk = layer._split(layer.qk(x)).transpose(1, 2)
    key = qk / qk.norm(dim=-1, keepdim=True)
    value = layer._heads(layer.value(x)).transpose(1, 2)
    allowed = masks.matrix(masks.causal if causal else masks.all_keys, seq_len)
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
        patch.setattr(windows, "TILE", Sizes(tile, tile))
        patch.setattr(hashing, "HASH_TILE", Sizes(40 * tile, 40 * tile))
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
        outputs.append(LshAttention.apply(qk, layer._heads(value), buckets, window))  # type: ignore[no-untyped-call]
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
            found.append((layer(x, Context(causal=False)).y - want).square().mean().item())
        errors.append(sum(found) / len(found))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_a_token_with_nothing_else_reads_itself() -> None:
    layer, x = made(chunk=4), inputs(2, 40)
    torch.manual_seed(0)
    y = layer(x, Context(causal=True)).y
    torch.testing.assert_close(y[:, 0], layer.out(layer.value(x))[:, 0])


@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
def test_sequences_of_a_batch_do_not_meet(neighbourhood: str) -> None:
    layer, x = made(chunk=8, neighbourhood=neighbourhood), inputs(3, 37)
    torch.manual_seed(0)
    together = layer(x, Context(causal=True)).y
    for b in range(3):
        torch.manual_seed(0)
        torch.testing.assert_close(layer(x[b : b + 1], Context(causal=True)).y, together[b : b + 1])


def test_gradients_of_the_function_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    qk, value = (torch.randn(1, 7, HEADS, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for band, causal in itertools.product((True, False), repeat=2):
        window = Window.choose(7, 4, 2, band=band, causal=causal)
        buckets = hash_rows(qk, rotations(HEADS, 3, 3, (4,), CPU), 3)
        assert torch.autograd.gradcheck(
            lambda a, b, g=buckets, w=window: LshAttention.apply(a, b, g, w),  # type: ignore[no-untyped-call]
            (qk, value),
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


@pytest.mark.parametrize(
    ("wanted", "least"),
    [(1, 1), (2, 2), (3, 4), (33, 34), (63, 64), (64, 64), (65, 72), (72, 72), (73, 80), (81, 96), (97, 100),
     (128, 128), (129, 140), (512, 512), (513, 520), (1000, 1008), (8192, 8192), (32768, 32768)],
)  # fmt: skip
def test_default_buckets_are_the_least_that_hash_cheaply(wanted: int, least: int) -> None:
    assert least_buckets(wanted) == least
    pairs = itertools.product(range(2, 2 * wanted + 1, 2), repeat=2) if wanted <= 600 else []
    products = [a * b for a, b in pairs if a <= b <= 2 * a and a * b >= wanted]
    if 64 < wanted <= 600:
        assert least == min(products)


@given(seq_len=st.integers(1, 2**21), chunk=st.integers(1, 300))
def test_default_buckets_can_be_hashed_and_hold_half_a_chunk(seq_len: int, chunk: int) -> None:
    n, wanted = ReformerConfig(chunk=chunk).buckets(seq_len), -(-2 * seq_len // chunk)
    factors(n)
    assert n == 1 if seq_len <= chunk else wanted <= n <= 1.2 * wanted + 1
    ReformerConfig(n_buckets=n)


@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
@pytest.mark.parametrize("fed", [1, 30, 64, 700])
def test_buckets_are_those_of_the_length_that_the_layer_was_built_for(fed: int, neighbourhood: str) -> None:
    """So that a prefix gives a prefix of the outputs, where it is causal: the paper's chunks are not."""
    layer, x = made(1024, neighbourhood=neighbourhood).eval(), inputs(1, 1024).detach()
    assert layer.n_buckets == ReformerConfig().buckets(1024)
    prefix, whole = layer(x[:, :fed], Context(causal=True)).y, layer(x, Context(causal=True)).y[:, :fed]
    if neighbourhood == "band":
        torch.testing.assert_close(prefix, whole)
    assert layer._buckets(x[:, :fed], layer._split(layer.qk(x[:, :fed]))).equal(
        layer._buckets(x, layer._split(layer.qk(x)))[..., :fed]
    )


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


def test_evaluation_hashes_alike_in_every_pass_and_each_layer_in_its_own_way() -> None:
    """From no generator of others; the first rounds are the same however many there are."""
    x = inputs(1, 128)
    dims = Workload(causal=True, batch_size=1, seq_len=128, d_model=WIDTH, heads=HEADS)
    found = []
    for layer, rounds in ((0, 4), (0, 2), (1, 4)):
        one = Reformer(ReformerConfig(chunk=8, n_hashes=rounds), dims, layer).eval()
        qk = one._split(inputs(1, 128, torch.float32))
        before = torch.get_rng_state()
        found.append(one._buckets(x, qk))
        assert torch.get_rng_state().equal(before)
        assert one._buckets(x, qk).equal(found[-1])
    assert found[0][:2].equal(found[1])
    assert not found[0].equal(found[2])
    assert not found[0][0, :1].equal(found[0][0, 1:])  # the heads of a round


def test_a_vector_and_its_multiples_share_buckets() -> None:
    """Keys and queries differ in length alone, so hashing either is the same."""
    torch.manual_seed(0)
    x = torch.randn(1, 40, HEADS, 8)
    given = rotations(HEADS, 8, 2, (8,), CPU)
    assert hash_rows(x * inverse_length(x), given, 2).equal(hash_rows(x, given, 2))


# ------------------------------------------------------------------------------------------ gates


@pytest.mark.parametrize("knobs", [{}, {"chunk": 16, "n_hashes": 2}, {"chunk": 10, "n_buckets": 4}])
def test_the_band_sees_no_future(knobs: dict[str, Any]) -> None:
    dims = Workload(causal=True, batch_size=2, seq_len=230, d_model=32, heads=2)
    assert leak(Reformer, ReformerConfig(**knobs), dims, 2, CPU) <= LEAK_TOLERANCE


NUMBERS = {"bfloat16": torch.float32, "float32": torch.float32, "float64": torch.float64}
"""The dtype of the weights; bfloat16 is autocast, as cells run it."""


def stacked(seq_len: int, name: str, depth: int = 4, **knobs: Any) -> Callable[[Tensor], Tensor]:
    """The residual stream after `depth` layers in evaluation."""
    layers = []
    for index in range(depth):
        dims = Workload(causal=True, batch_size=2, seq_len=seq_len, d_model=WIDTH, heads=HEADS)
        layer = Reformer(ReformerConfig(**knobs), dims, index).eval().to(NUMBERS[name])
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
        layers.append(layer)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
            for layer in layers:
                x = x + layer(x, Context(causal=True)).y
        return x

    return run


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("seq_len", "knobs"),
    [(1000, {}), (257, {"chunk": 10}), (130, {"n_buckets": 16, "chunk": 7}), (63, {"n_buckets": 60})],
    ids=str,
)
@pytest.mark.parametrize("tile", [30000, *slow(None)], ids=["many pieces", "default pieces"])
def test_no_bit_of_an_output_depends_on_a_later_token(
    seq_len: int, knobs: dict[str, Any], name: str, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four layers deep, where one bit can change a bucket; later tokens change little, much, or to NaN."""
    if tile:
        monkeypatch.setattr(windows, "TILE", Sizes(tile, tile))
        monkeypatch.setattr(windows, "MOST_PIECES", 10**6)
    for seed in range(2):
        torch.manual_seed(seed)
        run = stacked(seq_len, name, **knobs)
        x = torch.randn(2, seq_len, WIDTH, dtype=NUMBERS[name])
        before = run(x)
        sizes = itertools.cycle((1.0, 1e-2, 1e6, math.inf, math.nan))
        for cut in (1, seq_len // 2 + 1, seq_len - 1):
            for where in (slice(cut, None), slice(cut, cut + 1)):
                changed = x.clone()
                changed[:, where] += next(sizes) * torch.randn_like(changed[:, where])
                assert run(changed)[:, :cut].equal(before[:, :cut]), (seed, cut, where)


POISONS = [1e6, 1e24, 1e38, math.inf, -math.inf, math.nan]


def poisoned(x: Tensor, where: tuple[Any, ...], poison: float) -> Tensor:
    x = x.detach().clone()
    x[where] = x[where] * poison if math.isfinite(poison) else poison
    return x.requires_grad_()


def attend(layer: Reformer, qk: Tensor, value: Tensor, causal: bool) -> Tensor:
    """The function itself: what is poisoned is either of its inputs, hashed alike."""
    window = layer._window(qk.shape[1], causal)
    buckets = hash_rows(
        qk.detach(), rotations(HEADS, WIDTH // HEADS, layer.rounds, (8,), CPU, 0), layer.rounds
    )
    y: Tensor = LshAttention.apply(qk, value, buckets, window)  # type: ignore[no-untyped-call]
    return y


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
def test_rows_of_a_batch_do_not_reach_each_other(neighbourhood: str, causal: bool, poison: float) -> None:
    """Whatever another row holds, and whatever gradient it gets, no bit of a row or its gradient moves."""
    layer = made(50, torch.float32, chunk=6, n_buckets=8, neighbourhood=neighbourhood).eval()
    torch.manual_seed(0)
    qk, value = torch.randn(2, 3, 50, HEADS, WIDTH // HEADS).unbind()
    direction = torch.randn_like(value)
    want: list[Tensor] = []
    for of_qk, of_value, of_grad in itertools.product((False, True), repeat=3):
        a = poisoned(qk, (1,), poison if of_qk else 1.0)
        b = poisoned(value, (1,), poison if of_value else 1.0)
        y = attend(layer, a, b, causal)
        grads = torch.autograd.grad(y, [a, b], poisoned(direction, (1,), poison if of_grad else 1.0))
        got = [t.detach()[::2] for t in (y, *grads)]
        want = want or got
        assert all(one.equal(other) for one, other in zip(got, want, strict=True))
        assert all(t.isfinite().all() for t in got)
        if (of_qk or of_value) and not math.isfinite(poison):
            assert y[1].isnan().all(), "a token that is not finite must not pass for one that is"


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("at", [1, 20, 49])
def test_a_later_token_reaches_no_earlier_one(at: int, poison: float) -> None:
    """Not a bit of the outputs, and of gradients of losses on earlier tokens no more than rounding: the
    order in which a key's gradients are added up depends on where the sorted order has its buckets."""
    layer = made(50, torch.float32, chunk=6, n_buckets=8).eval()
    x = torch.randn(2, 50, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for given_ in (x, poisoned(x, (slice(None), at), poison)):
        y = layer(given_, Context(causal=True)).y[:, :at]
        results.append([y, torch.autograd.grad(y.square().sum(), given_)[0][:, :at]])
    assert results[0][0].equal(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_the_tokens_that_read_a_lost_one_are_lost_and_no_others() -> None:
    for neighbourhood, causal in itertools.product(("band", "chunk"), (True, False)):
        layer = made(60, torch.float32, chunk=5, n_buckets=8, neighbourhood=neighbourhood).eval()
        qk, value = torch.randn(2, 1, 60, HEADS, WIDTH // HEADS).unbind()
        buckets = hash_rows(qk, rotations(HEADS, WIDTH // HEADS, layer.rounds, (8,), CPU, 0), layer.rounds)
        reads = layer._readable(buckets, causal).any(0)  # (H, T, T)
        for at in (0, 13, 59):
            y = attend(layer, qk, poisoned(value, (0, at), math.nan), causal)[0].transpose(0, 1)
            want = reads[:, :, at] | (torch.arange(60) == at)
            assert y.isnan().any(-1).equal(want)
            assert y.isnan().all(-1).equal(want)


def test_the_chunks_of_the_paper_do_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ReformerConfig(chunk=16, neighbourhood="chunk")
    dims = Workload(causal=True, batch_size=1, seq_len=230, d_model=32, heads=2)
    assert "later tokens" in (Reformer.leak(config) or "")
    assert Reformer.leak(ReformerConfig()) is None
    assert leak(Reformer, config, dims, 1, CPU) > 100 * LEAK_TOLERANCE
    monkeypatch.setattr(Reformer, "leak", classmethod(lambda cls, config: None))
    with pytest.raises(GateFailed):
        leak(Reformer, config, dims, 1, CPU)


@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
def test_float32_equals_the_float64_reference(causal: bool, neighbourhood: str) -> None:
    dims = Workload(causal=True, batch_size=2, seq_len=333, d_model=32, heads=2)
    config = ReformerConfig(neighbourhood=neighbourhood)
    with torch.random.fork_rng():
        reference_error(Reformer, config, dims, 0, CPU, causal=causal)


@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_len", [256, 1000, *slow(64, 4096)])
def test_flops(seq_len: int, causal: bool, neighbourhood: str) -> None:
    dims = Workload(causal=True, batch_size=2, seq_len=seq_len, d_model=64, heads=2)
    layer = Reformer(ReformerConfig(neighbourhood=neighbourhood), dims)
    with FakeTensorMode(allow_non_fake_inputs=True), CountFlops() as counter, torch.no_grad():
        layer(torch.randn(2, seq_len, 64), Context(causal=causal))
    formula = layer.cost(replace(dims, causal=causal))
    window = layer._window(seq_len, causal)
    wasted = 2 * 4 * 64 * layer.rounds * (window.computed - window.admitted)
    assert counter.total == formula.total + wasted
    assert layer.flop_overhead_reason
    assert 0.99 <= (counter.total - formula.tokenwise) / formula.mixing <= COST_LIMIT


def test_rounds_that_would_all_be_alike_run_once() -> None:
    """One bucket: a second round would read the same pairs again, and pay for them."""
    dispatched = []
    for n_hashes in (1, 4):
        layer = made(chunk=16, n_buckets=1, n_hashes=n_hashes, dtype=torch.float32)
        with CountFlops() as counter, torch.no_grad():
            layer(torch.randn(1, 50, WIDTH), Context(causal=True))
        dispatched.append((counter.total, layer.cost(replace(layer.dims, causal=True))))
    assert dispatched[0] == dispatched[1]


@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
def test_flops_count_the_pairs_that_a_bucket_of_all_tokens_has(causal: bool, neighbourhood: str) -> None:
    for seq_len, chunk in itertools.product(range(1, 23), range(1, 9)):
        layer = made(24, chunk=chunk, n_buckets=2, n_hashes=3, neighbourhood=neighbourhood)
        allowed = layer._readable(torch.zeros(seq_len, dtype=torch.int64), causal)
        allowed |= torch.eye(seq_len, dtype=torch.bool) & ~allowed.any(-1, keepdim=True)
        dims = Workload(causal=True, batch_size=2, seq_len=seq_len, d_model=WIDTH, heads=HEADS)
        hashing = 2 * 2 * seq_len * WIDTH * 3
        want = 2 * 3 * 4 * WIDTH * int(allowed.sum()) + hashing
        assert layer.cost(replace(dims, causal=causal)).mixing == want, (seq_len, chunk)


# ----------------------------------------------------------------------------- recompute and cost


def test_recomputation_gives_the_same_gradients() -> None:
    layer, x = made(chunk=6), inputs(2, 41)
    torch.manual_seed(3)
    y = checkpoint(lambda x: layer(x, Context(causal=True)).y, x, use_reentrant=False)
    assert_same(with_gradients(layer, x, y), run(layer, x, causal=True))


def test_half_precision_hashes_alike_and_is_near() -> None:
    layer, x = made(dtype=torch.float32, chunk=8, n_buckets=1), inputs(1, 50, torch.float32)
    want = run(layer, x, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        y = layer(x, Context(causal=True)).y
    assert y.dtype == torch.bfloat16
    got = with_gradients(layer, x, y.float())
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_memory_grows_with_length_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted at two lengths; nothing of size T × rounds × buckets or T × rounds × channels is kept."""
    for module in (hashing, windows):
        monkeypatch.setattr(module, "MOST_PIECES", 4)  # fewer calls; larger tiles only raise the peak
    peaks = []
    for seq_len in (2**17, 2**19):
        with FakeTensorMode(), LiveStorage() as storage:
            dims = Workload(causal=True, batch_size=1, seq_len=seq_len, d_model=256, heads=4)
            layer = Reformer(ReformerConfig(n_hashes=2), dims)
            x, grad = torch.randn(1, seq_len, 256, requires_grad=True), torch.randn(1, seq_len, 256)
            layer(x, Context(causal=True)).y.backward(grad)
        peaks.append(storage.peak)
    assert peaks[1] < 4.1 * peaks[0]
    assert peaks[1] / 2**19 <= 24 * 2**30 / 2**20


# ---------------------------------------------------------------------------------------- decoding


class Decoder:
    """One layer, token by token: all that it carries is in `tensors`, in tables of a fixed size."""

    def __init__(self, layer: Reformer, x: Tensor) -> None:
        """After the tokens x (1, T, C), from what the layer computes of them at once."""
        self.layer, self.seen = layer, x.shape[1]
        self.chunk, self.band = layer.config.chunk, layer.config.neighbourhood == "band"
        self.hashed = layer.n_buckets > 1
        qk, value = layer._split(layer.qk(x))[0], layer._heads(layer.value(x))[0]
        buckets = layer._buckets(x, layer._split(layer.qk(x))).permute(1, 2, 0)  # (H, T, R)
        self.rotations = rotations(
            HEADS, WIDTH // HEADS, layer.rounds, factors(layer.n_buckets), CPU, layer.layer
        )
        self.counts = torch.stack([(buckets == k).sum(1) for k in range(layer.n_buckets)], -1).int()
        self.query_key, self.value, self.bucket = self.fitted(
            qk.transpose(0, 1), value.transpose(0, 1), buckets.int()
        )

    @property
    def tensors(self) -> list[Tensor]:
        tables = [self.query_key, self.value, *self.rotations]
        if self.hashed:
            tables += [self.bucket]
        if self.hashed and not self.band and self.bucket.shape[1] < self.seen:
            tables += [self.counts]
        return tables

    def fitted(self, qk: Tensor, value: Tensor, bucket: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that a later one can read, in their order, in tables with room for the most there can
        be; (H, S, …) each, an empty place in bucket −1."""
        kept = self.chunk if self.band else 2 * self.chunk - 1
        room = min(self.seen, self.layer.rounds * self.layer.n_buckets * kept)
        if qk.shape[1] <= room:
            return qk, value, bucket
        tables = qk.new_zeros(HEADS, room, qk.shape[2]), value.new_zeros(HEADS, room, value.shape[2])
        buckets = bucket.new_full((HEADS, room, bucket.shape[2]), -1)
        for h in range(HEADS):
            same = bucket[h, :, None] == bucket[h, None]  # (S, S, R)
            younger = (same & torch.ones(same.shape[:2]).triu(1).bool()[..., None]).sum(1)
            needed = ((younger < kept) & (bucket[h] >= 0)).any(-1)
            count = int(needed.sum())
            for table, given_ in zip((*tables, buckets), (qk, value, bucket), strict=True):
                table[h, room - count :] = given_[h, needed]
        return *tables, buckets

    def step(self, x: Tensor) -> Tensor:
        """The output of the next token (1, 1, C)."""
        layer = self.layer
        padded = torch.cat([x.new_zeros(1, self.seen, WIDTH), x], 1)  # for its position
        query = layer._split(layer.qk(padded))[0, -1]  # (H, D)
        value = layer._heads(layer.value(x))[0, 0]
        bucket = hash_rows(query[None, None].float(), self.rotations, layer.rounds)[..., 0].T.int()  # (H, R)
        y = torch.stack([self.read(h, query[h], value[h], bucket[h]) for h in range(HEADS)])
        self.counts.scatter_add_(2, bucket[..., None].long(), torch.ones_like(bucket)[..., None])
        self.seen += 1
        self.query_key, self.value, self.bucket = self.fitted(
            torch.cat([self.query_key, query[:, None]], 1),
            torch.cat([self.value, value[:, None]], 1),
            torch.cat([self.bucket, bucket[:, None]], 1),
        )
        out: Tensor = layer.out(y.flatten()[None, None])
        return out

    def read(self, h: int, query: Tensor, value: Tensor, bucket: Tensor) -> Tensor:
        stored = self.bucket[h]
        read = torch.zeros(len(stored), dtype=torch.bool)
        for r, own in enumerate(bucket.tolist()):
            most = self.chunk
            if not self.band:  # those since the beginning of the chunk before, in the sorted order
                place = int(self.counts[h, r, : own + 1].sum())
                most = place - max(0, (place // self.chunk - 1) * self.chunk)
            same = (stored[:, r] == own).nonzero().flatten()
            read[same[max(0, len(same) - most) :]] = True
        if not read.any():
            return value
        keys = self.query_key[h][read]
        scores = keys * inverse_length(keys) @ query / len(query) ** 0.5
        y: Tensor = scores.softmax(0) @ self.value[h][read]
        return y


@pytest.mark.parametrize(
    "knobs",
    [{"n_hashes": 2}, {"n_buckets": 1, "chunk": 5}, {"n_buckets": 2, "n_hashes": 1, "chunk": 3},
     {"n_buckets": 4, "n_hashes": 2, "chunk": 2}, {"n_buckets": 72, "chunk": 4}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("neighbourhood", ["band", "chunk"])
def test_decoding_needs_the_state_that_is_stated_and_no_more(
    neighbourhood: str, knobs: dict[str, Any]
) -> None:
    """Token by token from the state alone; its bytes are counted at every length."""
    layer = made(80, neighbourhood=neighbourhood, **{"chunk": 8, **knobs}).eval()
    x = inputs(1, 80).detach()
    for begin in (1, 7, 50):
        decoder = Decoder(layer, x[:, :begin])
        for t in range(begin, begin + 24):
            dims = Workload(causal=True, batch_size=1, seq_len=t, d_model=WIDTH, heads=HEADS, element_bytes=8)
            assert sum(table.nbytes for table in decoder.tensors) == layer.state_bytes(dims), t
            want = layer(x[:, : t + 1], Context(causal=True)).y[:, -1:]
            torch.testing.assert_close(decoder.step(x[:, t : t + 1]), want, rtol=1e-9, atol=1e-9)


def test_rotations_are_the_same_for_all_sequences_of_a_batch() -> None:
    layer = made(64, n_hashes=2)
    one, three = (
        layer.state_bytes(Workload(causal=True, batch_size=b, seq_len=30, d_model=WIDTH, heads=HEADS))
        for b in (1, 3)
    )
    rotated = 4 * 2 * WIDTH * sum(size // 2 for size in factors(layer.n_buckets))
    assert three - rotated == 3 * (one - rotated)


# ------------------------------------------------------------------------------------------- knobs


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
