"""Poolingformer against a second implementation, what it reduces to, and a planted leak."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, feed, make_layer, numbers, rotated
from torch import Tensor, einsum
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure import causality_gate
from bench.measure.gate_failed import GateFailed
from bench.measure.memory import LiveStorage
from variants.attention.poolingformer import Poolingformer, PoolingformerConfig
from variants.base import Context, Workload
from variants.ops.patterns.band_parts import Band, band_parts

SMALL: list[dict[str, Any]] = [
    {"window": 5, "pooled_window": 12, "pool": 3},
    {"window": 3, "pooled_window": 4, "pool": 2, "pooling": "dynamic"},
    {"window": 2, "pooled_window": 7, "pool": 7, "pooling": "max"},
    {"window": 1, "pooled_window": 3, "pool": 1, "weights": "own"},
]


def layer_of(tokens: int, **knobs: Any) -> Poolingformer:
    layer = make_layer(Poolingformer, PoolingformerConfig(**knobs), dims_for(tokens))
    assert isinstance(layer, Poolingformer)
    return layer


def turned(x: Tensor, position: float) -> Tensor:
    """(B, H, D) at one position."""
    half = x.shape[-1] // 2
    angle = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    y = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat([y.real, y.imag], dim=-1)


def read(query: Tensor, some: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of one query (B, H, D) to keys and values (B, H, D): (B, C), 0 without any."""
    if not some:
        return torch.zeros_like(query).flatten(1)
    keys, values = (torch.stack(each, dim=1) for each in zip(*some, strict=True))
    scores = einsum("bhd,bjhd->bjh", query, keys) / math.sqrt(query.shape[-1])
    weights = scores.exp() / scores.exp().sum(1, keepdim=True)
    return einsum("bjh,bjhd->bhd", weights, values).flatten(1)


def one_pool(t: Tensor, taps: Tensor | None, pooling: str) -> Tensor:
    """Keys or values (B, s, H, D) of a pool → (B, H, D)."""
    if pooling == "max":
        return t.max(dim=1).values
    if taps is None:
        return t.sum(1) / t.shape[1]
    middle = t[:, (t.shape[1] - 1) // 2]
    weights = torch.stack([(middle * taps[:, i]).sum(-1).exp() for i in range(t.shape[1])], dim=1)
    return ((weights / weights.sum(1, keepdim=True))[..., None] * t).sum(1)


def by_hand(layer: Poolingformer, x: Tensor, *, causal: bool) -> Tensor:
    """Token by token: lists of the keys that it reads at each level."""
    config, tokens = layer.config, x.shape[1]
    size, most = config.pool, config.pooled_window // config.pool
    weights = layer.projections.qkv.weight.chunk(3)
    q, k, v = (einsum("btc,dc->btd", x, w).unflatten(-1, (2, -1)) for w in weights)
    q, k = rotated(q), rotated(k)
    first = []
    for t in range(tokens):
        distances = [(j, t - j if causal else abs(t - j)) for j in range(tokens)]
        near = [j for j, distance in distances if 0 <= distance < config.window]
        first.append(read(q[:, t], [(k[:, j], v[:, j]) for j in near]))
    y = torch.stack(first, dim=1)
    weights = (layer.second if config.weights == "own" else layer.projections.qkv).weight.chunk(3)
    q, k, v = (einsum("btc,dc->btd", y, w).unflatten(-1, (2, -1)) for w in weights)
    q = rotated(q)
    taps = layer.taps if config.pooling == "dynamic" else (None, None)
    pools = []
    for a in range(0, tokens, size):
        b = min(a + size, tokens)
        key = turned(one_pool(k[:, a:b], taps[0], config.pooling), (a + b - 1) / 2)
        pools.append((key, one_pool(v[:, a:b], taps[1], config.pooling)))
    outputs = []
    for t in range(tokens):
        low, high = t // size - most, t // size - 1 if causal else t // size + most
        near = [pool for j, pool in enumerate(pools) if low <= j <= high]
        outputs.append(y[:, t] + read(q[:, t], near))
    return einsum("btc,dc->btd", torch.stack(outputs, dim=1), layer.projections.out.weight)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("tokens", "knobs"),
    [
        (1, SMALL[0]),
        (3, SMALL[0]),
        (25, SMALL[0]),
        (24, {**SMALL[0], "weights": "own"}),
        (23, {"window": 30, "pooled_window": 40, "pool": 4}),
        (19, {**SMALL[0], "pooling": "max"}),
        (20, SMALL[1]),
        (21, SMALL[1]),
    ],
)
def test_it_reads_a_window_then_pools(tokens: int, knobs: dict[str, Any], causal: bool) -> None:
    layer = layer_of(tokens, **knobs)
    x = numbers(2, tokens, layer.dims.d_model)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: by_hand(layer, x, causal=causal),
        [x, *layer.parameters()],
    )


def test_pools_of_one_token_are_not_changed_by_pooling() -> None:
    x = numbers(2, 20, 16).detach()
    layers = [layer_of(20, window=4, pooled_window=6, pool=1, pooling=p) for p in ("mean", "max", "dynamic")]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict(), strict=False)
    for causal in (True, False):
        want, *others = (feed(layer, x, causal=causal) for layer in layers)
        assert all(difference(y, want) <= EXACT for y in others)


def test_equal_logits_are_a_mean() -> None:
    mean, dynamic = (layer_of(23, window=4, pooled_window=8, pool=4, pooling=p) for p in ("mean", "dynamic"))
    dynamic.load_state_dict(mean.state_dict(), strict=False)
    with torch.no_grad():
        dynamic.taps.zero_()
    x = numbers(2, 23, 16).detach()
    for causal in (True, False):
        assert difference(feed(dynamic, x, causal=causal), feed(mean, x, causal=causal)) <= EXACT


def test_the_first_tokens_read_no_pool() -> None:
    """The outputs of the first pool are those of the window alone."""
    layer, alone = (layer_of(20, window=4, pooled_window=w, pool=w) for w in (6, 20))
    alone.load_state_dict(layer.state_dict())
    x = numbers(2, 20, 16).detach()
    y, window = (feed(each, x, causal=True) for each in (layer, alone))
    assert difference(y[:, :6], window[:, :6]) <= EXACT
    assert difference(y[:, 6:7], window[:, 6:7]) > 1e-3


def test_shared_weights_need_heads_as_wide_as_the_inputs() -> None:
    dims = replace(dims_for(20), head_size=12)
    reason = Poolingformer.unsupported(PoolingformerConfig(), dims, causal=True)
    assert reason is not None
    assert "use weights=own" in reason
    layer = make_layer(Poolingformer, PoolingformerConfig(pool=2, pooled_window=8, weights="own"), dims)
    assert layer.unsupported(layer.config, dims, causal=True) is None
    x = numbers(2, 20, 16).detach()
    assert difference(feed(layer, x, causal=True), layer.reference(x, Context(causal=True))) <= EXACT


def test_outputs_do_not_depend_on_the_first_position() -> None:
    x = numbers(2, 26, 16)
    for causal in (True, False):
        layer = layer_of(26, **SMALL[0])
        shifted = Context(causal=causal, positions=torch.arange(1000, 1026))
        assert difference(layer(x, shifted).y, layer(x, Context(causal=causal)).y) <= EXACT


class OpenPool(Poolingformer):
    """A planted leak: a token reads its own pool, which has later tokens."""

    def pools_read(self, seq_len: int, *, causal: bool) -> int:
        return -(-seq_len // self.config.pool)

    def _second_band(self, seq_len: int, *, causal: bool) -> Band:
        keys, back = self.pools_read(seq_len, causal=causal), self.config.pools
        return Band(seq_len=seq_len, keys=keys, back=back, ahead=0, unit=self.config.pool)


def test_the_gate_finds_a_pool_that_is_not_complete() -> None:
    config = PoolingformerConfig(window=8, pooled_window=24, pool=4)
    dims, cpu = dims_for(140, 2), torch.device("cpu")
    assert causality_gate.leak(Poolingformer, config, dims, 2, cpu) <= causality_gate.LEAK_TOLERANCE
    with pytest.raises(GateFailed, match="causality gate"):
        causality_gate.leak(OpenPool, config, dims, 2, cpu)


BANDS = [
    Band(seq_len=tokens, keys=keys, back=back, ahead=ahead, unit=unit)
    for tokens in (1, 2, 7, 50, 131, 400)
    for unit in (1, 4)
    for back in (0, 1, 5, 40)
    for ahead, keys in ((-1, tokens // unit), (0, -(-tokens // unit)), (back, -(-tokens // unit)))
    if keys and back + 1 + ahead > 0
]


def test_parts_of_a_band_hold_each_pair_once() -> None:
    """Groups of a part have no common key, so their gradients can be added in one operation."""
    cpu = torch.device("cpu")
    for band in BANDS:
        count = torch.zeros(band.seq_len, band.keys, dtype=torch.int64)
        for part in band_parts(band, 2, cpu):
            seen: list[int] = []
            for group in range(part.queries.groups):
                i, j = (cut.tokens(cpu) + group * cut.group_step for cut in (part.queries, part.keys))
                seen += j.tolist()
                mask = torch.ones(len(i), len(j), dtype=torch.bool) if part.mask is None else part.mask
                count[i[:, None], j] += mask.long()
            assert len(seen) == len(set(seen)), band
        unit, key = torch.arange(band.seq_len)[:, None] // band.unit, torch.arange(band.keys)
        wanted = (key >= unit - band.back) & (key <= unit + band.ahead)
        assert torch.equal(count, wanted.long()), band
        assert band.pairs() == int(wanted.sum()), band


@pytest.mark.slow
def test_memory_is_linear() -> None:
    """Of a million tokens, few tensors as long as the sequence are kept."""
    dims = Workload(causal=True, batch_size=1, seq_len=2**20, d_model=256, heads=4)
    with FakeTensorMode(), LiveStorage() as storage:
        layer = Poolingformer(PoolingformerConfig(), dims)
        x = torch.randn(1, dims.seq_len, 256, requires_grad=True)
        layer(x, Context(causal=True)).y.sum().backward()
    assert storage.peak < 14 * 2**30, storage.peak / 2**30
