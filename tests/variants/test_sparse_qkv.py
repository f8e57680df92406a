"""The sparse QKV layer: its two maps written out, dense attention as a special case, and its size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    EXACT,
    assert_same,
    difference,
    everything,
    feed,
    make_layer,
    numbers,
    oracle,
    rotated,
    softmax_attention,
)
from torch import Tensor

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from variants.attention.dense import Dense, DenseConfig
from variants.attention.sparse_qkv import ModuleConvolution, Multiplicative, SparseQKV, SparseQKVConfig
from variants.base import Clock, Context, Workload
from variants.ops.convolutions import module_convolution as convolutions
from variants.ops.convolutions.module_convolution import module_convolution
from variants.ops.tile_size import Sizes

SMALL: list[dict[str, Any]] = [{"modules": 4}, {"modules": 2, "length_kernel": 5, "module_kernel": 1}]

CPU = torch.device("cpu")
both_directions = pytest.mark.parametrize("causal", [True, False])


def dims_of(tokens: int, batch: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=24, heads=2, element_bytes=8)


def make(tokens: int, **knobs: Any) -> SparseQKV:
    layer = make_layer(SparseQKV, SparseQKVConfig.of({"modules": 4, **knobs}), dims_of(tokens, 2))
    assert isinstance(layer, SparseQKV)
    return layer


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize(("channels", "modules"), [(12, 4), (12, 12), (12, 1)])
def test_the_multiplicative_layer_is_its_sum(tokens: int, channels: int, modules: int) -> None:
    """In both forms: by token, and as one matrix."""
    torch.manual_seed(0)
    layer, x = Multiplicative(channels, modules).double(), numbers(2, tokens, channels)
    assert_same(
        lambda: layer(x),
        lambda: torch.einsum("bti,si,mi->btsm", x, layer.gates, layer.shared.weight),
        [x, *layer.parameters()],
    )


def test_one_module_is_a_dense_layer_with_factors_of_its_inputs() -> None:
    torch.manual_seed(0)
    layer, x = Multiplicative(12, 1).double(), numbers(2, 9, 12)
    got = layer(x)[:, :, 0]
    assert difference(got, F.linear(x * layer.gates[0], layer.shared.weight)) <= EXACT


@pytest.mark.parametrize("modules", [1, 2, 3, 8])
def test_it_has_every_permutation(modules: int) -> None:
    """As the paper proves: output (s, m) takes the input of which D_s and E_m are 1."""
    layer, order = Multiplicative(24, modules).double(), torch.randperm(24)
    size = 24 // modules
    with torch.no_grad():
        layer.gates.copy_(F.one_hot(order // size, modules).T)
        layer.shared.weight.copy_(F.one_hot(order % size, size).T)
    for tokens in (1, 30):
        x = numbers(2, tokens, 24)
        assert difference(layer(x).flatten(2), x[..., order.argsort()]) == 0


@pytest.mark.parametrize("piece", [1, 500, 2**20])
@pytest.mark.parametrize(("tokens", "kernel"), [(1, (3, 3)), (41, (3, 1)), (100, (1, 5)), (37, (4, 3))])
def test_convolutions_are_those_of_torch(
    tokens: int, kernel: tuple[int, int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, in pieces of any size."""
    monkeypatch.setattr(convolutions, "PIECE", Sizes(cpu=piece, accelerator=0))
    z, weight = numbers(2, kernel[0] - 1 + tokens, 5, 4), numbers(6, *kernel, 4, seed=2)
    assert_same(
        lambda: module_convolution(z, weight, maps=3, device_type="cpu"),
        lambda: (
            F.conv2d(z.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), padding=(0, kernel[1] // 2))
            .unflatten(1, (3, 2))
            .permute(0, 3, 1, 4, 2)
        ),
        [z, weight],
    )


def only_itself(layer: ModuleConvolution) -> None:
    """Make the convolution the identity."""
    _, _, modules, size = layer.weight.shape
    same = torch.eye(size, dtype=layer.weight.dtype).repeat(layer.maps, 1)
    with torch.no_grad():
        layer.weight.zero_()[:, -1, modules // 2] = same


@both_directions
@pytest.mark.parametrize("modules", [1, 4])
def test_without_convolutions_it_is_dense_attention_with_one_map(causal: bool, modules: int) -> None:
    """Queries, keys and values are the multiplicative layer, and nothing follows attention."""
    layer, x = make(30, modules=modules), numbers(2, 30, 24)
    for part in (layer.query_key, layer.out):
        only_itself(part)
    dense = make_layer(Dense, DenseConfig(), dims_of(30))
    inner = layer.multiplicative
    weight = (inner.gates[:, None] * inner.shared.weight).flatten(0, 1).detach()
    dense.load_state_dict(
        {"projections.qkv.weight": weight.repeat(3, 1), "projections.out.weight": torch.eye(24).double()}
    )
    assert difference(feed(layer, x, causal=causal), oracle(dense, x, everything(30, causal=causal))) <= EXACT


def by_loops(layer: SparseQKV, x: Tensor, *, causal: bool) -> Tensor:
    """Every output of every convolution by itself."""
    inner, count = layer.multiplicative, layer.config.modules
    z = torch.einsum("bti,si,mi->btsm", x, inner.gates, inner.shared.weight)
    parts = []
    for weight in (*layer.query_key.weight.chunk(2), layer.out.weight):
        _, tokens, modules, _ = weight.shape
        rows = []
        for t in range(x.shape[1]):
            for s in range(count):
                total = torch.zeros_like(z[:, 0, 0])
                for f in range(max(0, t - tokens + 1), t + 1):
                    for other in range(max(0, s - modules // 2), min(count, s + modules // 2 + 1)):
                        tap = weight[:, f - t + tokens - 1, other - s + modules // 2]
                        total = total + torch.einsum("nm,bm->bn", tap, z[:, f, other])
                rows.append(total)
        parts.append(torch.stack(rows, 1).reshape(*x.shape[:2], layer.dims.heads, -1))
    q, k, v = parts
    y = softmax_attention(rotated(q), rotated(k), v, everything(x.shape[1], causal=causal))
    return y.reshape(x.shape)


@both_directions
@pytest.mark.parametrize(
    "knobs", [{}, {"modules": 2, "length_kernel": 1}, {"modules": 3, "module_kernel": 5, "length_kernel": 4}]
)
def test_convolutions_read_the_last_tokens_and_the_modules_around(
    causal: bool, knobs: dict[str, Any]
) -> None:
    layer, x = make(9, **knobs), numbers(2, 9, 24)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: by_loops(layer, x, causal=causal),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("length_kernel", [1, 3])
@pytest.mark.parametrize("module_kernel", [1, 3])
def test_size(length_kernel: int, module_kernel: int) -> None:
    layer = make(8, modules=6, length_kernel=length_kernel, module_kernel=module_kernel)
    size = 24 // 6
    taps = length_kernel * (2 * module_kernel + 1)
    assert sum(p.numel() for p in layer.parameters()) == 24 * (6 + size) + taps * size**2
    cost = layer.cost(replace(dims_of(50, 3), causal=False))
    assert cost.parts == {
        "projections": 2 * 150 * 24 * 24,
        "convolution": 2 * 150 * taps * 6 * size**2,
        "attention": 4 * 3 * 24 * 50**2,
    }


@torch.no_grad()
@pytest.mark.parametrize("length_kernel", [1, 3, 40])
def test_decoding_keeps_the_modules_that_are_still_read(length_kernel: int) -> None:
    layer, x = make(30, length_kernel=length_kernel), numbers(2, 30, 24).detach()
    state, outputs = layer.init_state(2, 30, clock=Clock(), dtype=torch.float64), []
    assert state.nbytes == layer.decoding_bytes(dims_of(30, 2)) == 2 * 24 * 8 * (60 + length_kernel - 1)
    for tokens in x.split([2, 1, 7, 1, 1, 18], dim=1):
        outputs.append(layer(tokens, Context(causal=True), state).y)
        state.clock.advance(tokens.shape[1])
    assert difference(torch.cat(outputs, 1), feed(layer, x, causal=True)) <= EXACT
    assert layer.state_bytes(dims_of(1, 2)) == 2 * 24 * 8 * (2 + min(1, length_kernel - 1))


def test_sizes_that_do_not_fit() -> None:
    def reason(dims: Workload, **knobs: Any) -> str:
        config = SparseQKVConfig.of(knobs)
        found = SparseQKV.unsupported(config, dims, causal=True)
        assert found is not None
        with pytest.raises(ValueError, match=f"^{found}$"):
            SparseQKV(config, dims)
        return found

    assert reason(dims_of(8), modules=5) == "modules=5: must divide d_model=24"
    wide = reason(replace(dims_of(8), head_size=4), modules=4)
    assert wide.startswith("head_size=4: no output layer maps 8 channels")
    with pytest.raises(ValueError, match="module_kernel=2: allowed is an odd number"):
        SparseQKVConfig(module_kernel=2)
    shared = SparseQKV.unsupported(SparseQKVConfig(modules=4), replace(dims_of(8), kv_heads=1), causal=True)
    assert (
        shared == "kv_heads=1: queries and keys are convolutions of the same modules; allowed is 2, the "
        "number of heads"
    )


def test_a_convolution_that_reads_the_next_token_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted leak: one zero less before the sequence, and one more behind it."""
    config = SparseQKVConfig(modules=4)
    assert gates.leak(SparseQKV, config, dims_of(70, 2), 2, CPU) <= gates.LEAK_TOLERANCE
    monkeypatch.setattr(
        SparseQKV, "_padded", lambda self, x: F.pad(self.multiplicative(x), (0, 0, 0, 0, 1, 1))
    )
    with pytest.raises(GateFailed, match="causality gate"):
        gates.leak(SparseQKV, config, dims_of(70, 2), 2, CPU)
