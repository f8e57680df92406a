"""Induced set attention against two attentions written out, what it reduces to, and its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, feed, make_layer, numbers, rotated
from torch import Tensor, einsum

from bench.measure import reference_gate
from variants.attention.isab import Isab, IsabConfig
from variants.base import Context, Workload

SMALL: list[dict[str, Any]] = [{"points": 3}, {"points": 5, "weights": "separate"}]


def layer_of(tokens: int, **knobs: Any) -> Isab:
    layer = make_layer(Isab, IsabConfig(**knobs), dims_for(tokens))
    assert isinstance(layer, Isab)
    return layer


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """(B, n, H, D) by complex numbers, at any positions."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.exp(1j * positions.double()[:, None] * rates)[:, None]
    y = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([y.real, y.imag], dim=-1)


def attention(weights: Any, asking: Tensor, asked: Tensor, at: Tensor, of: Tensor) -> Tensor:
    """Multi-head attention by einsum: (B, n, C) and (B, N, C) → (B, n, C)."""
    w_q, w_k, w_v = weights.qkv.weight.chunk(3)
    q, k, v = (
        einsum("btc,dc->btd", x, w).unflatten(-1, (2, -1))
        for x, w in ((asking, w_q), (asked, w_k), (asked, w_v))
    )
    scores = einsum("bihd,bjhd->bhij", turned(q, at), turned(k, of)) * q.shape[-1] ** -0.5
    y = einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return einsum("btc,dc->btd", y.flatten(2), weights.out.weight)


@pytest.mark.parametrize("weights", ["shared", "separate"])
@pytest.mark.parametrize(("tokens", "points"), [(1, 1), (1, 4), (9, 3), (6, 10)])
def test_it_is_two_attentions(weights: str, tokens: int, points: int) -> None:
    layer = layer_of(tokens, points=points, weights=weights)
    x = numbers(3, tokens, layer.dims.d_model)
    middles = [(i + 0.5) / points * (tokens - 1) for i in range(points)]
    at = torch.tensor(middles, dtype=torch.float64)
    order = torch.arange(tokens)

    def by_hand() -> Tensor:
        inducing = layer.induction if weights == "separate" else layer.projections
        learnt = layer.points.expand(3, -1, -1)
        hidden = learnt + attention(inducing, learnt, x, at, order)
        centred = hidden - hidden.mean(-1, keepdim=True)
        hidden = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return attention(layer.projections, x, hidden * layer.norm.weight + layer.norm.bias, order, at)

    assert_same(lambda: feed(layer, x, causal=False), by_hand, [x, *layer.parameters()])


def test_a_point_for_each_token_that_reads_it_alone_gives_dense_attention() -> None:
    """With T points whose first attention is one-hot, the tokens read one another, normalised.

    The points are as small as the tolerance allows and their queries as large, so that H is the norm of what
    the points read: the values of the tokens by the first output projection, which is their inverse here.
    """
    tokens = 6
    layer = layer_of(tokens, points=tokens, weights="separate")
    width = layer.dims.d_model
    x = torch.eye(width, dtype=torch.float64)[None, :tokens]
    at = layer._point_positions(tokens, None)
    order = torch.arange(tokens)
    with torch.no_grad():
        induction = layer.induction
        induction.qkv.weight[width : 2 * width] = torch.eye(8, width).repeat(2, 1)  # keys of length 1
        keys = turned((x @ induction.qkv.weight.chunk(3)[1].T).unflatten(-1, (2, -1)), order)
        queries = turned(keys, -at).flatten(2)[0]  # (m, C): the queries before their positions
        layer.points.copy_(1e-9 * torch.eye(width)[:tokens])
        induction.qkv.weight[:width].zero_()
        induction.qkv.weight[:width, :tokens] = 1e12 * queries.T
        induction.out.weight.copy_(torch.linalg.inv(induction.qkv.weight.chunk(3)[2]))
    want = attention(layer.projections, x, layer.norm(x), order, at)  # keys are where the points are
    found = feed(layer, x, causal=False)
    assert difference(found, want) <= 1e-6


def test_points_have_no_order_of_their_own_without_positions() -> None:
    """All at one position, their permutation changes nothing."""
    layer = layer_of(11, points=5)
    x = numbers(2, 11, layer.dims.d_model).detach()
    still = Context(causal=False, positions=torch.zeros(11, dtype=torch.int64))
    want = layer(x, still).y
    with torch.no_grad():
        layer.points.copy_(layer.points[torch.tensor([3, 0, 4, 1, 2])])
    assert difference(layer(x, still).y, want) <= EXACT
    shuffled = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    assert difference(layer(x[:, shuffled], still).y, want[:, shuffled]) <= EXACT  # the tokens are a set


def test_shared_weights_are_those_of_dense_attention_and_the_points() -> None:
    shared, separate = (layer_of(9, points=5, weights=w) for w in ("shared", "separate"))
    count = [sum(p.numel() for p in layer.parameters()) for layer in (shared, separate)]
    width = shared.dims.d_model
    assert count == [4 * width**2 + 5 * width + 2 * width, 8 * width**2 + 5 * width + 2 * width]


def test_causal_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="every inducing point reads all tokens"):
        layer_of(20)(torch.zeros(1, 20, 16), Context(causal=True))


def test_rotation_of_the_oracle_is_the_usual_one() -> None:
    x = numbers(1, 7, 2, 8).detach()
    assert difference(turned(x, torch.arange(7)), rotated(x)) <= EXACT


@pytest.mark.parametrize("weights", ["shared", "separate"])
def test_it_passes_the_reference_gate(weights: Any) -> None:
    dims = Workload(causal=False, batch_size=2, seq_len=301, d_model=32, heads=2)
    reference_gate.reference_error(
        Isab, IsabConfig(weights=weights), dims, 0, torch.device("cpu"), causal=False
    )
