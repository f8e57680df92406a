"""Memory-compressed attention against what it reduces to, and a leak that its gate must find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, difference, dims_for, feed, make_layer, numbers, rotated, softmax_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from bench.measure.memory import LiveStorage
from variants.attention.memory_compressed import MemoryCompressed, MemoryCompressedConfig
from variants.base import Context, Dims, Workload

SMALL: list[dict[str, Any]] = [{"rate": 4, "sharing": "none"}, {"rate": 1}, {"rate": 30}]

CPU = torch.device("cpu")


def make(tokens: int, **knobs: Any) -> MemoryCompressed:
    layer = make_layer(MemoryCompressed, MemoryCompressedConfig(**knobs), dims_for(tokens, 2))
    assert isinstance(layer, MemoryCompressed)
    with torch.no_grad():
        layer.null_value.copy_(numbers(*layer.null_value.shape, seed=8))
    return layer


def projected(layer: MemoryCompressed, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, T, H, D) without positions."""
    weights = layer.projections.qkv.weight.chunk(3)
    q, k, v = ((x @ weight.T).unflatten(-1, (layer.dims.heads, -1)) for weight in weights)
    return q, k, v


def out(layer: MemoryCompressed, y: Tensor) -> Tensor:
    return y.flatten(2) @ layer.projections.out.weight.T


def with_null(layer: MemoryCompressed, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The null key in front: (B, S, H, D) → (B, 1 + S, H, D)."""
    null = layer.null_value.expand(len(v), 1, -1, -1)
    return torch.cat([torch.zeros_like(null), k], dim=1), torch.cat([null, v], dim=1)


@pytest.mark.parametrize("causal", [True, False])
def test_pools_of_one_token_and_an_identity_are_dense_attention_to_earlier_tokens(causal: bool) -> None:
    """With the null key, and without the token itself if causal."""
    tokens = 23
    layer = make(tokens, rate=1)
    with torch.no_grad():
        layer.kernels.copy_(torch.eye(layer.dims.head_dim).expand_as(layer.kernels))
    x = numbers(2, tokens, layer.dims.d_model)
    allowed = torch.ones(tokens, tokens, dtype=torch.bool)
    allowed = F.pad(allowed.tril(-1) if causal else allowed, (1, 0), value=True)

    def dense() -> Tensor:
        q, k, v = projected(layer, x)
        return out(layer, softmax_attention(rotated(q), *with_null(layer, rotated(k), v), allowed))

    given = [x, layer.null_value, *layer.projections.parameters()]
    assert_same(lambda: feed(layer, x, causal=causal), dense, given)


@pytest.mark.parametrize("sharing", ["kv", "none"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "rate"), [(24, 4), (23, 4), (3, 5), (50, 3)])
def test_pools_are_those_of_torchs_convolution(tokens: int, rate: int, causal: bool, sharing: str) -> None:
    """`conv1d` with a group for each head; the mask is written out token by token."""
    layer = make(tokens, rate=rate, sharing=sharing)
    x = numbers(2, tokens, layer.dims.d_model)
    heads, head_dim = layer.dims.heads, layer.dims.head_dim
    pools = -(-tokens // rate)
    rows = [[j < 0 or not causal or t >= (j + 1) * rate for j in range(-1, pools)] for t in range(tokens)]

    def convolved(rows: Tensor, kernel: Tensor) -> Tensor:
        weight = kernel.unflatten(1, (rate, head_dim)).permute(0, 3, 2, 1).flatten(0, 1)
        padded = F.pad(rows.flatten(2).mT, (0, pools * rate - tokens))
        return F.conv1d(padded, weight, stride=rate, groups=heads).mT.unflatten(-1, (heads, head_dim))

    def oracle() -> Tensor:
        q, k, v = projected(layer, x)
        k, v = (
            convolved(rows, kernel)
            for rows, kernel in zip((k, v), layer.kernels.expand(2, -1, -1, -1), strict=True)
        )
        k = rotated(k.repeat_interleave(rate, dim=1))[:, ::rate]  # the position of the pool's first token
        return out(layer, softmax_attention(rotated(q), *with_null(layer, k, v), torch.tensor(rows)))

    assert_same(lambda: feed(layer, x, causal=causal), oracle, [x, *layer.parameters()])


def test_the_first_tokens_read_the_null_value_only() -> None:
    layer = make(20, rate=6)
    y = feed(layer, numbers(2, 20, layer.dims.d_model), causal=True)
    want = out(layer, layer.null_value.expand(2, 6, -1, -1))
    assert difference(y[:, :6], want) <= 1e-12
    assert difference(y[:, 6:12], want) > 0.1


def test_outputs_do_not_depend_on_the_first_position() -> None:
    layer = make(40, rate=4)
    x = numbers(2, 40, layer.dims.d_model)
    for causal in (True, False):
        shifted = Context(causal=causal, positions=torch.arange(1000, 1040))
        assert difference(layer(x, shifted).y, layer(x, Context(causal=causal)).y) <= 1e-9


class OpenPool(MemoryCompressed):
    """A planted leak: a query reads the pool that contains it."""

    def _readable(self, tokens: int, *, causal: bool) -> int:
        return -(-tokens // self.config.rate)

    def _slots(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


def leak_of(variant: type[MemoryCompressed]) -> float:
    with torch.random.fork_rng():
        return gates.leak(variant, MemoryCompressedConfig(), dims_for(140, 2), 2, CPU)


def test_the_gate_finds_a_pool_that_is_not_complete() -> None:
    assert leak_of(MemoryCompressed) <= gates.LEAK_TOLERANCE
    with pytest.raises(GateFailed, match="causality gate"):
        leak_of(OpenPool)


@pytest.mark.parametrize("rate", [3, 4, 16])
def test_pairs_are_those_of_the_mask(rate: int) -> None:
    for tokens in (1, rate, 3 * rate + 1, 100):
        layer, work = make(tokens, rate=rate), dims_for(tokens)
        pairs = sum(1 + t // rate for t in range(tokens))
        mixing = layer.cost(replace(work, causal=True)).parts["attention"]
        assert mixing == 4 * work.inner_dim * pairs


def test_keys_and_values_keep_their_size_at_first() -> None:
    torch.manual_seed(0)
    dims = Dims(seq_len=64, d_model=256, heads=4)
    layer = MemoryCompressed(MemoryCompressedConfig(rate=4, sharing="none"), dims)
    pooled = torch.stack(layer._pools(torch.randn(2, 2, 400, 4, 64), torch.arange(100) * 4))
    torch.testing.assert_close(pooled.square().mean().item(), 1.0, rtol=0.05, atol=0)


def test_memory_is_linear() -> None:
    """Scores are never stored: a million tokens of one layer need less than dense attention."""
    dims = Workload(causal=True, batch_size=1, seq_len=2**20, d_model=256, heads=4)
    with FakeTensorMode(), LiveStorage() as storage:
        layer = MemoryCompressed(MemoryCompressedConfig(rate=4), dims)
        x = torch.randn(1, dims.seq_len, 256, requires_grad=True)
        layer(x, Context(causal=True)).y.sum().backward()
    assert storage.peak < 16 * 2**30
