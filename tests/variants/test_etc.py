"""Global-local attention against lists of keys, what it reduces to, and its limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, feed, make_layer, numbers, oracle, rotated
from torch import Tensor, einsum
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure import reference_gate
from bench.measure.memory import LiveStorage
from variants.attention.etc import Etc, EtcConfig
from variants.base import Context, Workload

SMALL: list[dict[str, Any]] = [
    {"window": 5, "global_tokens": 3},
    {"window": 2, "global_tokens": 5, "weights": "separate"},
    {"window": 1, "global_tokens": 1},
]

both_weights = pytest.mark.parametrize("weights", ["shared", "separate"])


def layer_of(tokens: int, **knobs: Any) -> Etc:
    layer = make_layer(Etc, EtcConfig(**knobs), dims_for(tokens))
    assert isinstance(layer, Etc)
    with torch.no_grad():  # 1 and 0 at first, which would hide that they are left out
        layer.norm.weight.copy_(1 + 0.1 * torch.randn(16))
        layer.norm.bias.copy_(0.1 * torch.randn(16))
    return layer


def turned(x: Tensor, position: float) -> Tensor:
    """(B, H, D) at one position, by complex numbers."""
    half = x.shape[-1] // 2
    angle = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    y = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat([y.real, y.imag], dim=-1)


def read(weights: Any, asking: Tensor, at: float, keys: list[tuple[Tensor, float]]) -> Tensor:
    """One query (B, C) reads keys (B, C) at positions: (B, C)."""
    w_q, w_k, w_v = weights.qkv.weight.chunk(3)

    def heads(x: Tensor, w: Tensor) -> Tensor:
        return einsum("bc,dc->bd", x, w).unflatten(-1, (2, -1))

    q = turned(heads(asking, w_q), at)
    scores = torch.stack([(q * turned(heads(x, w_k), p)).sum(-1) for x, p in keys], dim=-1) / math.sqrt(8)
    values = torch.stack([heads(x, w_v) for x, _ in keys], dim=-1)
    y = einsum("bhj,bhdj->bhd", scores.softmax(-1), values).flatten(1)
    return einsum("bc,dc->bd", y, weights.out.weight)


def by_hand(layer: Etc, x: Tensor, window: int, n: int) -> Tensor:
    """Each query with a list of its keys."""
    tokens = x.shape[1]
    side = layer.global_projections if layer.config.weights == "separate" else layer.projections
    places = [(i + 0.5) / n * (tokens - 1) for i in range(n)]
    sequence = [(x[:, t], float(t)) for t in range(tokens)]
    learnt = [(layer.global_tokens[i].expand(len(x), -1), p) for i, p in enumerate(places)]
    after = []
    for g, p in learnt:
        h = g + read(side, g, p, [*learnt, *sequence])
        centred = h - h.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        after.append((normal * layer.norm.weight + layer.norm.bias, p))
    outputs = [
        read(layer.projections, token, at, sequence[max(0, t - window + 1) : t + window] + after)
        for t, (token, at) in enumerate(sequence)
    ]
    return torch.stack(outputs, dim=1)


@both_weights
@pytest.mark.parametrize(
    ("tokens", "window", "n"), [(1, 1, 1), (1, 4, 3), (13, 1, 2), (13, 3, 4), (6, 20, 10), (40, 8, 1)]
)
def test_it_is_four_kinds_of_pairs(tokens: int, window: int, n: int, weights: str) -> None:
    layer = layer_of(tokens, window=window, global_tokens=n, weights=weights)
    x = numbers(2, tokens, 16)
    assert_same(
        lambda: feed(layer, x, causal=False),
        lambda: by_hand(layer, x, window, n),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("window", [1, 4, 30])
def test_global_tokens_that_hold_nothing_only_share_the_weights(window: int) -> None:
    """n keys of 0 have scores of 0: the window's output times Z / (Z + n), for its normaliser Z."""
    tokens, n = 21, 3
    layer = layer_of(tokens, window=window, global_tokens=n)
    layer.norm.requires_grad_(False)
    layer.norm.weight.zero_()
    layer.norm.bias.zero_()
    layer.projections.out.weight.requires_grad_(False).copy_(torch.eye(16))
    x = numbers(2, tokens, 16)

    def scaled() -> Tensor:
        index = torch.arange(tokens)
        allowed = (index[:, None] - index).abs() < window
        q, k, _ = (
            rotated(einsum("btc,dc->btd", x, w).unflatten(-1, (2, -1)))
            for w in layer.projections.qkv.weight.chunk(3)
        )
        z = ((einsum("bihd,bjhd->bihj", q, k) / math.sqrt(8)).exp() * allowed[:, None]).sum(-1)
        y = oracle(layer, x, allowed[None]).unflatten(-1, (2, -1))
        return (y * (z / (z + n))[..., None]).flatten(2)

    assert_same(lambda: feed(layer, x, causal=False), scaled, [x, layer.projections.qkv.weight])


def reach(layer: Etc, x: Tensor, query: int) -> set[int]:
    """The tokens that have a gradient from the output of a query."""
    (gradient,) = torch.autograd.grad(feed(layer, x, causal=False)[0, query].sum(), x)
    return {int(j) for j in gradient[0].abs().amax(-1).nonzero()[:, 0]}


def test_global_tokens_carry_every_token_to_every_token() -> None:
    layer, x = layer_of(40, window=4, global_tokens=2, weights="separate"), numbers(1, 40, 16)
    assert reach(layer, x, 20) == set(range(40))
    with torch.no_grad():  # the global tokens forget what they have read
        layer.global_projections.out.weight.zero_()
    assert reach(layer, x, 20) == set(range(17, 24))
    assert reach(layer, x, 0) == set(range(4))


def test_global_tokens_have_no_order_but_their_places() -> None:
    layer, x = layer_of(17, window=4, global_tokens=5), numbers(2, 17, 16).detach()
    still = Context(causal=False, positions=torch.zeros(17, dtype=torch.int64))
    placed = Context(causal=False)
    want, want_placed = layer(x, still).y, layer(x, placed).y
    with torch.no_grad():
        layer.global_tokens.copy_(layer.global_tokens[torch.tensor([3, 0, 4, 1, 2])])
    assert difference(layer(x, still).y, want) <= EXACT
    assert difference(layer(x, placed).y, want_placed) > 1e-3


def test_outputs_do_not_depend_on_the_first_position() -> None:
    layer, x = layer_of(17, window=4, global_tokens=5), numbers(2, 17, 16).detach()
    later = Context(causal=False, positions=torch.arange(1000, 1017))
    assert difference(layer(x, later).y, layer(x, Context(causal=False)).y) <= EXACT


@both_weights
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_keys_are_those_of_equal_heads(kv_heads: int, weights: str) -> None:
    knobs: dict[str, Any] = {"window": 4, "global_tokens": 3, "weights": weights}
    sizes: dict[str, Any] = {"causal": False, "batch_size": 2, "seq_len": 30, "d_model": 16, "heads": 4}
    few = make_layer(Etc, EtcConfig(**knobs), Workload(**sizes, kv_heads=kv_heads))
    many = make_layer(Etc, EtcConfig(**knobs), Workload(**sizes))

    def spread(name: str, weight: Tensor) -> Tensor:
        if not name.endswith("qkv.weight"):
            return weight
        q, k, v = weight.split([16, 4 * kv_heads, 4 * kv_heads])
        repeated = (t.unflatten(0, (kv_heads, 4)).repeat_interleave(4 // kv_heads, 0) for t in (k, v))
        return torch.cat([q, *(t.flatten(0, 1) for t in repeated)])

    many.load_state_dict({name: spread(name, weight) for name, weight in few.state_dict().items()})
    x = numbers(2, 30, 16)
    assert_same(lambda: feed(few, x, causal=False), lambda: feed(many, x, causal=False), [x])


@both_weights
def test_implementations_agree(weights: Any) -> None:
    fused, plain = (
        layer_of(75, window=9, global_tokens=4, weights=weights, impl=impl) for impl in ("fused", "plain")
    )
    plain.load_state_dict(fused.state_dict())
    x = numbers(2, 75, 16)
    assert_same(
        lambda: feed(fused, x, causal=False),
        lambda: feed(plain, x, causal=False),
        [x, *fused.parameters()],
        [x, *plain.parameters()],
    )


def test_parameters_are_the_projections_and_the_global_tokens() -> None:
    shared, separate = (layer_of(9, global_tokens=5, weights=w) for w in ("shared", "separate"))
    count = [sum(p.numel() for p in layer.parameters()) for layer in (shared, separate)]
    assert count == [4 * 16**2 + 5 * 16 + 2 * 16, 8 * 16**2 + 5 * 16 + 2 * 16]


@both_weights
@pytest.mark.parametrize(("tokens", "window"), [(1, 3), (23, 4), (9, 20)])
def test_cost_counts_the_pairs_of_the_list(tokens: int, window: int, weights: Any) -> None:
    n, batch = 3, 2
    layer = layer_of(tokens, window=window, global_tokens=n, weights=weights)
    local = sum(abs(i - j) < window for i in range(tokens) for j in range(tokens))
    cost = layer.cost(replace(dims_for(tokens, batch), causal=False))
    assert cost.mixing == batch * 4 * 16 * (local + tokens * n + n * (tokens + n))
    products = batch * tokens * (4 if weights == "shared" else 6) + n * (3 + 3 * batch)
    assert cost.tokenwise == 2 * products * 16**2


def test_causal_and_decoding_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="every global token reads all tokens"):
        layer_of(20)(torch.zeros(1, 20, 16), Context(causal=True))
    assert "no causal form" in (Etc.no_decoding(EtcConfig()) or "")


@both_weights
def test_it_passes_the_reference_gate(weights: Any) -> None:
    dims = Workload(causal=False, batch_size=2, seq_len=301, d_model=32, heads=2)
    config = EtcConfig(window=20, global_tokens=7, weights=weights)
    reference_gate.reference_error(Etc, config, dims, 0, torch.device("cpu"), causal=False)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "most"), [("shared", 14), ("separate", 14.25)])
def test_memory_is_linear_in_the_length(weights: Any, most: float) -> None:
    def peak(tokens: int) -> int:
        with FakeTensorMode(), LiveStorage() as storage:
            dims = Workload(causal=False, batch_size=1, seq_len=tokens, d_model=256, heads=4)
            layer = Etc(EtcConfig(weights=weights), dims)
            x = torch.empty(1, tokens, 256, requires_grad=True)
            y = layer(x, Context(causal=False)).y
            y.backward(torch.empty_like(y))
        return storage.peak

    assert peak(2**17) <= most / 8 * 2**30  # GiB at 2²⁰
    assert peak(2**18) <= 2.01 * peak(2**17)
