"""What variants share: rotary positions, projections, and local attention against the masked oracle.

Shapes: B batch, T tokens, C channels, H heads, D = C / H; (B, H, T, D) for queries, keys, values.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.measure.flops import CountFlops
from variants.base import Dims, Workload
from variants.ops.projections import Projections, local_attention, masked_attention, rotary, rotary_table

both_directions = pytest.mark.parametrize("causal", [True, False])
quick = settings(deadline=None, max_examples=40)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaves(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that want gradients."""
    q, k, v = (numbers(*shape, seed=seed).requires_grad_() for seed in range(3))
    return q, k, v


def slow_window(q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool) -> Tensor:
    """Query by query: softmax over the list of its keys."""
    seq_len, rows = q.shape[2], []
    for i in range(seq_len):
        keys = [j for j in range(seq_len) if abs(i - j) < window and (j <= i or not causal)]
        scores = (q[:, :, i : i + 1] * k[:, :, keys]).sum(-1) / math.sqrt(q.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append((weights[..., None] * v[:, :, keys]).sum(2))
    return torch.stack(rows, dim=2)


def assert_same(got: Tensor, want: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Outputs and gradients."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    direction = numbers(*want.shape, seed=9)
    found, wanted = (torch.autograd.grad(y, inputs, direction) for y in (got, want))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# --- rotary positions -----------------------------------------------------------------------------


@quick
@given(seq_len=st.integers(1, 40), half=st.integers(1, 8), heads=st.integers(1, 3))
def test_rotary_turns_each_pair_by_its_angle(seq_len: int, half: int, heads: int) -> None:
    """Channels i and i + D/2 are a point in the plane, turned by position · 10000^(−i / (D/2))."""
    x = numbers(2, seq_len, heads, 2 * half)
    y = rotary(x)
    for position in range(seq_len):
        for i in range(half):
            angle = position * 10_000.0 ** (-i / half)
            a, b = x[:, position, :, i], x[:, position, :, half + i]
            torch.testing.assert_close(y[:, position, :, i], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(y[:, position, :, half + i], a * math.sin(angle) + b * math.cos(angle))


@quick
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 3), st.sampled_from([2, 6, 16])))
def test_rotary_keeps_lengths_and_leaves_the_first_token(shape: tuple[int, ...]) -> None:
    x = numbers(*shape)
    y = rotary(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, 0], x[:, 0])


@quick
@given(i=st.integers(0, 60), j=st.integers(0, 60), shift=st.integers(1, 2000))
def test_rotary_scores_know_only_the_distance(i: int, j: int, shift: int) -> None:
    q, k = (numbers(1, 1, 1, 8, seed=seed).expand(1, 61 + shift, 1, 8) for seed in (0, 1))
    q, k = rotary(q)[0, :, 0], rotary(k)[0, :, 0]
    torch.testing.assert_close(q[i] @ k[j], q[i + shift] @ k[j + shift], rtol=1e-9, atol=1e-9)


def test_rotary_takes_any_axes_between() -> None:
    x = numbers(2, 7, 2, 3, 8)
    want = torch.stack([torch.stack([rotary(x[:, :, a, h]) for h in range(3)], 2) for a in range(2)], 2)
    assert torch.equal(rotary(x), want)


def test_rotary_tells_late_positions_apart_in_bfloat16() -> None:
    """Angles in bfloat16 would give positions past 256 the angle of a neighbour."""
    x = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    got, want = rotary(x), rotary(x.double())
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() < 0.02


FAR = [1, 2, 127, 128, 129, 255, 1000, 4095, 65_535, 2**19 + 1, 2**20 - 128, 2**20 - 1]
TURN = Decimal("6.28318530717958647692528676655900576839433879875021")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_rotary_table_is_exact_but_for_one_rounding(dtype: torch.dtype) -> None:
    """Up to position 2²⁰, against angles of 50 digits."""
    head_dim = 16
    cos, sin = rotary_table(2**20, head_dim, torch.empty(0, dtype=dtype))
    assert cos.shape == sin.shape == (2**20, head_dim // 2)
    for i in range(head_dim // 2):
        for position in FAR:
            with localcontext(prec=50):
                angle = float(position * Decimal(10_000) ** (Decimal(-2 * i) / head_dim) % TURN)
            for got, want in ((cos, math.cos(angle)), (sin, math.sin(angle))):
                # half a unit in the last place, and what float64 leaves of an angle of 2²⁰
                bound = 0.51 * torch.finfo(dtype).eps * abs(want) + 1e-9
                assert abs(got[position, i].item() - want) <= bound


def test_rotary_vectors_and_scores_far_out_in_float32() -> None:
    """At 2²⁰ − 1 as exact as at the start; scores know only the distance."""
    tokens = 2**20
    q, k = (numbers(1, 1, 16, seed=seed).expand(1, tokens, 16) for seed in (0, 1))
    got, want = rotary(q.float()), rotary(q)
    assert (got[:, FAR].double() - want[:, FAR]).abs().max() < 1e-6
    turned = rotary(k.float())
    scores = (got[:, [200, tokens - 1]] * turned[:, [0, tokens - 201]]).sum(-1)
    assert (scores[0, 0] - scores[0, 1]).abs() < 5e-6


def test_rotary_gradients() -> None:
    assert torch.autograd.gradcheck(rotary, (numbers(2, 5, 2, 4).requires_grad_(),))


# --- projections ----------------------------------------------------------------------------------


def test_projections_split_and_merge_are_the_four_matrices() -> None:
    torch.manual_seed(0)
    projections = Projections(Dims(seq_len=64, d_model=12, heads=3)).double()
    x = numbers(2, 9, 12)
    w_q, w_k, w_v = projections.qkv.weight.chunk(3)
    for got, weight, turned in zip(projections.split(x), (w_q, w_k, w_v), (True, True, False), strict=True):
        want = (x @ weight.T).reshape(2, 9, 3, 4)
        want = rotary(want) if turned else want
        torch.testing.assert_close(got, want.permute(0, 2, 1, 3))
    y = numbers(2, 3, 9, 4)
    heads = torch.cat([y[:, head] for head in range(3)], dim=-1)
    torch.testing.assert_close(projections.merge(y), heads @ projections.out.weight.T)


@pytest.mark.parametrize("size", [None, 20])
def test_projections_flops_are_those_dispatched(size: int | None) -> None:
    projections = Projections(Dims(seq_len=64, d_model=24, heads=2, head_size=size))
    with CountFlops() as counter:
        _, _, v = projections.split(torch.zeros(3, 50, 24))
        projections.merge(v)
    work = Workload(batch_size=3, seq_len=50, d_model=24, heads=2, head_size=size, causal=True)
    assert counter.total == Projections.flops(work)
    assert 5 * Projections.flops(work, 10) == Projections.flops(work)


# --- attention ------------------------------------------------------------------------------------


@quick
@given(seq_len=st.integers(1, 12), batch=st.integers(1, 2), data=st.data())
def test_masked_attention_is_a_softmax_over_the_allowed(
    seq_len: int, batch: int, data: st.DataObject
) -> None:
    """Keys that may not be read can be removed, one query at a time."""
    some = st.sets(st.integers(0, seq_len - 1), min_size=1)
    keys = [sorted(data.draw(some)) for _ in range(seq_len)]
    allowed = torch.zeros(seq_len, seq_len, dtype=torch.bool)
    for row, columns in zip(allowed, keys, strict=True):
        row[columns] = True
    q, k, v = leaves(batch, 2, seq_len, 4)
    rows = []
    for i, columns in enumerate(keys):
        scores = torch.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, columns]) / 2
        rows.append(torch.einsum("bhj,bhjd->bhd", scores.softmax(-1), v[:, :, columns]))
    assert_same(masked_attention(q, k, v, allowed), torch.stack(rows, dim=2), (q, k, v))


@both_directions
@quick
@given(seq_len=st.integers(1, 50), window=st.integers(1, 60), batch=st.integers(1, 3))
@example(seq_len=1, window=1, batch=1)
@example(seq_len=48, window=16, batch=2)
@example(seq_len=49, window=16, batch=2)
@example(seq_len=47, window=16, batch=2)
@example(seq_len=17, window=16, batch=1)
@example(seq_len=31, window=16, batch=1)
@example(seq_len=33, window=16, batch=1)
@example(seq_len=50, window=1, batch=1)
@example(seq_len=50, window=2, batch=1)
def test_local_attention_equals_loops(causal: bool, seq_len: int, window: int, batch: int) -> None:
    q, k, v = leaves(batch, 2, seq_len, 4)
    assert_same(
        local_attention(q, k, v, window=window, causal=causal),
        slow_window(q, k, v, window, causal),
        (q, k, v),
    )


@both_directions
@settings(deadline=None, max_examples=15)
@given(seq_len=st.integers(100, 700), window=st.integers(1, 300))
@example(seq_len=512, window=128)
def test_local_attention_equals_the_masked_oracle(causal: bool, seq_len: int, window: int) -> None:
    q, k, v = leaves(1, 1, seq_len, 4)
    distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    allowed = (distance.abs() < window) & (distance >= (0 if causal else -seq_len))
    assert_same(
        local_attention(q, k, v, window=window, causal=causal),
        masked_attention(q, k, v, allowed),
        (q, k, v),
    )


@both_directions
@pytest.mark.parametrize(("seq_len", "window"), [(1, 1), (7, 2), (9, 3), (8, 4), (5, 9)])
def test_local_attention_gradients(causal: bool, seq_len: int, window: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q, k, v, window=window, causal=causal)

    assert torch.autograd.gradcheck(attend, leaves(2, 1, seq_len, 2))


@both_directions
@pytest.mark.parametrize("layout", ["heads last", "every other token", "expanded", "reversed storage"])
def test_local_attention_reads_strided_inputs_as_their_values(causal: bool, layout: str) -> None:
    """Views as variants make them: transposed heads, subsequences of dilation, one head for all."""

    def view(seed: int) -> Tensor:
        if layout == "heads last":
            return numbers(2, 37, 3, 4, seed=seed).transpose(1, 2)
        if layout == "every other token":
            return numbers(2, 3, 74, 4, seed=seed)[:, :, 1::2]
        if layout == "expanded":
            return numbers(2, 1, 37, 4, seed=seed).expand(2, 3, 37, 4)
        return numbers(4, 37, 3, 2, seed=seed).permute(3, 2, 1, 0)

    strided = [view(seed) for seed in range(3)]
    assert not any(t.is_contiguous() for t in strided)
    inputs = tuple(t.detach().requires_grad_() for t in strided)
    packed = [t.contiguous() for t in inputs]
    assert_same(local_attention(*inputs, window=8, causal=causal), slow_window(*packed, 8, causal), inputs)


@pytest.mark.parametrize(("causal", "limit"), [(True, 2.0), (False, 1.5)])
@pytest.mark.parametrize("window", [16, 64])
def test_local_attention_is_given_few_keys_it_may_not_read(causal: bool, limit: float, window: int) -> None:
    """No T × T anywhere: the cost is linear in T, within the multiple that its docstring states."""
    costs = {}
    for seq_len in (1000, 10_000):
        q = torch.zeros(1, 1, seq_len, 2)
        with CountFlops() as counter:
            local_attention(q, q, q, window=window, causal=causal)
        pairs = seq_len * (window if causal else 2 * window - 1)
        costs[seq_len] = counter.total
        assert counter.total <= limit * 4 * 2 * pairs
    assert costs[10_000] == pytest.approx(10 * costs[1000], rel=0.1)
