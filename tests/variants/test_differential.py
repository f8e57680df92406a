"""Differential attention: two maps written out, special factors, both implementations, and a planted leak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, everything, feed, make_layer, numbers, oracle, rotated
from torch import Tensor, einsum

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from variants.attention.differential import Differential, DifferentialConfig
from variants.base import Clock, Context, Workload
from variants.ops import row_blocks
from variants.ops.tile_size import Sizes

SMALL: list[dict[str, Any]] = [{"impl": "sdpa"}]

CPU = torch.device("cpu")
both_directions = pytest.mark.parametrize("causal", [True, False])
both_impls = pytest.mark.parametrize("impl", ["rows", "sdpa"])


def dims_of(tokens: int, batch: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=16, heads=4, element_bytes=8)


def make(tokens: int, *, index: int = 0, **knobs: Any) -> Differential:
    layer = make_layer(Differential, DifferentialConfig.of(knobs), dims_of(tokens, 2), index=index)
    assert isinstance(layer, Differential)
    with torch.no_grad():
        layer.scale.copy_(torch.rand(8) + 0.5)
    return layer


def by_einsum(layer: Differential, x: Tensor, *, causal: bool) -> Tensor:
    """Two exponential maps of each pair, divided by their sums; λ and the norm written out."""
    weights = layer.get_parameter("projections.qkv.weight").chunk(3)
    q, k, v = (einsum("btc,dc->btd", x, w).unflatten(-1, (4, -1)) for w in weights)
    scores = einsum("bihd,bjhd->bhij", rotated(q), rotated(k)) / 2
    maps = scores.exp() * everything(x.shape[1], causal=causal)
    maps = (maps / maps.sum(-1, keepdim=True)).unflatten(1, (2, 2))
    initial = 0.8 - 0.6 * 2.718281828459045 ** (-0.3 * layer.layer)
    l_q1, l_k1, l_q2, l_k2 = layer.lambdas
    factor = torch.exp(einsum("d,d->", l_q1, l_k1)) - torch.exp(einsum("d,d->", l_q2, l_k2)) + initial
    y = einsum("bpij,bjpe->bipe", maps[:, :, 0] - factor * maps[:, :, 1], v.reshape(*x.shape[:2], 2, 8))
    y = y * (y.square().sum(-1, keepdim=True) / 8 + 1e-5) ** -0.5 * layer.scale * (1 - initial)
    return einsum("bte,ce->btc", y.flatten(2), layer.get_parameter("projections.out.weight"))


@both_directions
@both_impls
@pytest.mark.parametrize(("tokens", "index"), [(1, 0), (37, 0), (37, 3)])
def test_the_difference_of_two_maps(causal: bool, impl: str, tokens: int, index: int) -> None:
    """Outputs and gradients, also of the numbers that λ is made of."""
    layer, x = make(tokens, index=index, impl=impl), numbers(2, tokens, 16)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: by_einsum(layer, x, causal=causal),
        [x, *layer.parameters()],
    )


@both_directions
def test_blocks_of_any_size(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that divide the length and that do not, with one head at a time or several."""
    layer, x = make(50), numbers(2, 50, 16)
    for rows, scores in ((8, 1), (10, 2**20), (7, 700), (1, 100)):
        monkeypatch.setattr(row_blocks, "ROWS", Sizes(cpu=rows, accelerator=rows))
        monkeypatch.setattr(row_blocks, "SCORES", Sizes(cpu=scores, accelerator=scores))
        assert_same(
            lambda: feed(layer, x, causal=causal),
            lambda: by_einsum(layer, x, causal=causal),
            [x, *layer.parameters()],
        )


@both_impls
def test_equal_maps_cancel(impl: str) -> None:
    """With λ = 1 and equal queries and keys in a pair, nothing is left."""
    layer, x = make(20, impl=impl), numbers(1, 20, 16).detach()
    with torch.no_grad():
        qkv = layer.get_parameter("projections.qkv.weight").view(3, 2, 2, 4, 16)
        qkv[:2, :, 1] = qkv[:2, :, 0]
        layer.lambdas.zero_()
        layer.lambdas[0, 0], layer.lambdas[1, 0] = 1.0, torch.log(torch.tensor(1.8))  # 1.8 − 1 + 0.2
    assert abs(float(layer.factor().detach()) - 1) <= 1e-6
    assert feed(layer, x, causal=True).abs().max() <= 1e-4  # but for the epsilon of the norm


def test_without_the_second_map_it_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """λ = 0 and equal maps: before the norm, pairs have the outputs of dense attention."""
    layer, x = make(20), numbers(1, 20, 16).detach()
    with torch.no_grad():
        qkv = layer.get_parameter("projections.qkv.weight").view(3, 2, 2, 4, 16)
        qkv[:2, :, 1] = qkv[:2, :, 0]
    monkeypatch.setattr(Differential, "factor", lambda self: torch.zeros((), dtype=torch.float64))
    monkeypatch.setattr(
        Differential, "_merge", lambda self, y, dtype: self.projections.out(y.transpose(1, 2).flatten(2))
    )
    assert difference(feed(layer, x, causal=True), oracle(layer, x, everything(20, causal=True))) <= EXACT


def test_lambda_grows_with_depth() -> None:
    factors = [make(4, index=index).initial_factor for index in range(12)]
    assert abs(factors[0] - 0.2) <= 1e-12
    assert factors == sorted(factors)
    assert 0.77 < factors[-1] < 0.8


def test_an_odd_number_of_heads_is_refused() -> None:
    dims = Workload(causal=True, batch_size=1, seq_len=8, d_model=12, heads=3)
    reason = Differential.unsupported(DifferentialConfig(), dims, causal=True)
    assert reason == "heads=3: two heads are a pair of maps; allowed are even numbers"
    with pytest.raises(ValueError, match=r"^heads=3: two heads"):
        Differential(DifferentialConfig(), dims)


def test_decoding() -> None:
    layer, x = make(40), numbers(2, 40, 16)
    state = layer.init_state(2, 40, clock=Clock(), dtype=torch.float64)
    outputs = []
    with torch.no_grad():
        for tokens in x.split([9, 1, 1, 1, 12, 16], dim=1):
            outputs.append(layer(tokens, Context(causal=True), state).y)
            state.clock.advance(tokens.shape[1])
    assert difference(torch.cat(outputs, 1), feed(layer, x, causal=True)) <= EXACT


def test_a_norm_over_the_sequence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted leak: the norm of a pair's outputs takes the mean over tokens too."""
    config = DifferentialConfig()
    assert gates.leak(Differential, config, dims_of(70, 2), 2, CPU) <= gates.LEAK_TOLERANCE

    def over_tokens(self: Differential, y: Tensor, dtype: torch.dtype) -> Tensor:
        y = y / y.square().mean((2, 3), keepdim=True).sqrt()
        return self.projections.out(y.transpose(1, 2).flatten(2))

    monkeypatch.setattr(Differential, "_merge", over_tokens)
    with pytest.raises(GateFailed, match="causality gate"):
        gates.leak(Differential, config, dims_of(70, 2), 2, CPU)
