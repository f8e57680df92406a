"""Latent attention: dense attention of its own keys and values, the cache, and the absorbed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, everything, feed, make_layer, numbers, rotated
from torch import Tensor, einsum

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from variants.attention.latent_attention import LatentAttention, LatentAttentionConfig
from variants.base import Clock, Context, Workload

SMALL: list[dict[str, Any]] = [{"rank": 5, "rotary": 2}]

CPU = torch.device("cpu")


def dims_of(tokens: int, batch: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=16, heads=2, element_bytes=8)


def make(tokens: int, **knobs: Any) -> LatentAttention:
    layer = make_layer(LatentAttention, LatentAttentionConfig.of(knobs), dims_of(tokens, 2))
    assert isinstance(layer, LatentAttention)
    with torch.no_grad():
        layer.scale.copy_(torch.rand(layer.rank) + 0.5)
    return layer


def by_einsum(layer: LatentAttention, x: Tensor, *, causal: bool) -> Tensor:
    """Scores as the sum of two products: of the latent vectors, and of the rotary channels."""
    head, turned, rank = 8, layer.turned, layer.rank
    q = einsum("btc,hec->bthe", x, layer.queries.weight.unflatten(0, (2, -1)))
    down = einsum("btc,dc->btd", x, layer.down.weight)
    c = down[..., :rank] * layer.scale
    c = c * (down[..., :rank].square().sum(-1, keepdim=True) / rank + 1e-6) ** -0.5
    up = layer.up.weight.view(2, 2, head, rank)
    scores = einsum("bihd,hdr,bjr->bhij", q[..., :head], up[:, 0], c)
    shared = rotated(down[..., None, rank:])[:, :, 0]
    scores = (scores + einsum("bihd,bjd->bhij", rotated(q[..., head:]), shared)) / (head + turned) ** 0.5
    weights = scores.exp() * everything(x.shape[1], causal=causal)
    weights = weights / weights.sum(-1, keepdim=True)
    y = einsum("bhij,bjr,hdr->bihd", weights, c, up[:, 1])
    return einsum("bte,ce->btc", y.flatten(2), layer.out.weight)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("knobs", [{}, {"rank": 3, "rotary": 6}, {"rank": 40}])
@pytest.mark.parametrize("tokens", [1, 33])
def test_keys_and_values_are_those_of_the_latent_vectors(
    causal: bool, knobs: dict[str, Any], tokens: int
) -> None:
    layer, x = make(tokens, **knobs), numbers(2, tokens, 16)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: by_einsum(layer, x, causal=causal),
        [x, *layer.parameters()],
    )


def test_decoding_keeps_one_vector_a_token() -> None:
    """r + R numbers, fewer than the 2·H·D of dense attention."""
    layer, x = make(40, rank=5, rotary=2), numbers(2, 40, 16)
    state = layer.init_state(2, 40, clock=Clock(), dtype=torch.float64)
    assert state.nbytes == layer.decoding_bytes(dims_of(40, 2)) == 2 * 40 * (5 + 2) * 8
    outputs = []
    with torch.no_grad():
        for tokens in x.split([9, 1, 1, 1, 12, 16], dim=1):
            outputs.append(layer(tokens, Context(causal=True), state).y)
            state.clock.advance(tokens.shape[1])
    assert difference(torch.cat(outputs, 1), feed(layer, x, causal=True)) <= EXACT


def test_the_norm_hides_the_length_of_the_latent_vector() -> None:
    layer, x = make(20), numbers(1, 20, 16).detach()
    before = feed(layer, x, causal=True)
    with torch.no_grad():
        layer.down.weight[: layer.rank] *= 50
    assert difference(feed(layer, x, causal=True), before) <= 1e-4  # but for the epsilon of the norm


def test_about_the_parameters_of_dense_attention() -> None:
    """By default, at a usual size."""
    dims = Workload(causal=True, batch_size=1, seq_len=8, d_model=256, heads=4)
    layer = LatentAttention(LatentAttentionConfig(), dims)
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    assert abs(parameters / (4 * 256**2) - 1) <= 0.05


def test_a_mean_over_the_sequence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted leak: latent vectors are normalised over all tokens instead of over channels."""
    config = LatentAttentionConfig()
    assert gates.leak(LatentAttention, config, dims_of(70, 2), 2, CPU) <= gates.LEAK_TOLERANCE

    def over_tokens(self: LatentAttention, latents: Tensor) -> Tensor:
        return latents / latents.square().mean(1, keepdim=True).sqrt() * self.scale

    monkeypatch.setattr(LatentAttention, "_normalised", over_tokens)
    with pytest.raises(GateFailed, match="causality gate"):
        gates.leak(LatentAttention, config, dims_of(70, 2), 2, CPU)
