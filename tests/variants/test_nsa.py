"""Native sparse attention: its three branches, its selection, and what early queries read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import EXACT, assert_same, difference, feed, make_layer, numbers, rotated
from torch import Tensor, einsum

from bench.measure import gates
from bench.measure.memory import LiveStorage
from variants.attention.nsa import NSA, NSAConfig
from variants.base import Clock, Workload
from variants.ops.chosen import compressed_blocks
from variants.ops.chosen.compressed_blocks import Compression, block_scores

SMALL: list[dict[str, Any]] = [
    {"compress": 4, "stride": 2, "block": 4, "blocks": 5, "window": 6},
    {"compress": 3, "stride": 3, "block": 6, "blocks": 4, "window": 9, "impl": "plain"},
]

HEADS = 4


def dims_of(tokens: int, batch: int = 1, kv_heads: int | None = None) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=16, heads=HEADS, kv_heads=kv_heads)


def one_softmax(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query (D,) and its keys (D,); 0 without any."""
    if not keys:
        return torch.zeros_like(q)
    weights = (torch.stack(keys) @ q * len(q) ** -0.5).softmax(0)
    return weights @ torch.stack(values)


def written_out(layer: NSA, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs by loops over sequences, heads and tokens, from equations 5 to 12; and the mask of the selected
    branch (B, heads of keys, T, T)."""
    dims, config = layer.dims, layer.config
    sizes = [dims.inner_dim, dims.key_dim, dims.key_dim]
    weights = layer.get_parameter("projections.qkv.weight").split(sizes)
    q, k, v = (einsum("btc,dc->btd", x, w).unflatten(-1, (-1, dims.head_dim)) for w in weights)
    q, k = rotated(q), rotated(k)
    gates_of = torch.sigmoid(x @ layer.gate.weight.T).unflatten(-1, (3, dims.heads))
    length, stride, block, group = config.compress, config.stride, config.block, dims.queries_per_key
    (batch, tokens), read = x.shape[:2], torch.zeros(x.shape[0], dims.key_heads, *x.shape[1:2] * 2)
    y = torch.zeros_like(q)
    for b in range(batch):
        for h in range(dims.key_heads):
            means = [
                [
                    (t[b, i : i + length, h] * layer.taps[n]).sum(0)
                    for i in range(0, tokens - length + 1, stride)
                ]
                for n, t in enumerate((k, v))
            ]
            pools = [[m + m @ layer.maps[n] for m in means[n]] for n in range(2)]
            for t in range(tokens):
                heads = range(h * group, (h + 1) * group)
                complete = [i for i in range(len(pools[0])) if i * stride + length - 1 <= t]
                importance = [0.0] * (t // block + 1)
                for head in heads:
                    query = q[b, t, head].detach()
                    scores = [float((query * pools[0][i].detach()).sum()) for i in complete]
                    probabilities = (torch.tensor(scores, dtype=x.dtype) * dims.head_dim**-0.5).softmax(0)
                    for i, p in zip(complete, probabilities.tolist(), strict=True):
                        for start in range(i * stride, i * stride + length, stride):
                            if start // block <= t // block:
                                importance[start // block] += p
                own = t // block
                free = sorted(range(1, max(1, own - 1)), key=lambda j: -importance[j])
                chosen = {0, max(0, own - 1), own, *free[: config.blocks - 3]}
                listed = [j for j in range(t + 1) if j // block in chosen]
                read[b, h, t, listed] = 1
                near = range(max(0, t - config.window + 1), t + 1)
                for head in heads:
                    query = q[b, t, head]
                    branches = [
                        one_softmax(query, *([pool[i] for i in complete] for pool in pools)),
                        *(
                            one_softmax(query, [k[b, j, h] for j in js], [v[b, j, h] for j in js])
                            for js in (listed, near)
                        ),
                    ]
                    total = sum(gates_of[b, t, i, head] * part for i, part in enumerate(branches))
                    y[b, t, head] = total
    return y.flatten(2) @ layer.get_parameter("projections.out.weight").T, read.bool()


def layer_of(config: NSAConfig, dims: Workload) -> NSA:
    """With maps of compressed keys and values that are not the mean."""
    layer = make_layer(NSA, config, dims)
    assert isinstance(layer, NSA)
    with torch.no_grad():
        layer.taps.copy_(numbers(*layer.taps.shape, seed=7))
        layer.maps.add_(numbers(*layer.maps.shape, seed=8))
    return layer


@settings(deadline=None, max_examples=5)
@given(
    tokens=st.integers(1, 30),
    sizes=st.sampled_from([(4, 2, 4), (3, 3, 6), (2, 1, 3), (6, 2, 6), (1, 1, 1)]),
    blocks=st.integers(3, 6),
    window=st.integers(1, 9),
    kv_heads=st.sampled_from([None, 2, 1]),
    impl=st.sampled_from(["fused", "plain"]),
)
@example(tokens=1, sizes=(4, 2, 4), blocks=5, window=6, kv_heads=None, impl="fused")
@example(tokens=29, sizes=(4, 2, 4), blocks=5, window=6, kv_heads=2, impl="fused")
@example(tokens=30, sizes=(2, 1, 3), blocks=4, window=4, kv_heads=1, impl="plain")
def test_equals_the_equations_of_the_paper(
    tokens: int, sizes: tuple[int, int, int], blocks: int, window: int, kv_heads: int | None, impl: Any
) -> None:
    compress, stride, block = sizes
    config = NSAConfig(
        compress=compress,
        stride=stride,
        block=block,
        blocks=blocks,
        window=window,
        impl=impl,
        group=HEADS // (kv_heads or HEADS),
    )
    dims = dims_of(tokens, 1, kv_heads)
    layer, x = layer_of(config, dims), numbers(1, tokens, 16)
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: written_out(layer, x)[0], [x, *layer.parameters()]
    )
    pairs = layer.cost(dims).parts["selected"] // (4 * layer.dims.head_dim)
    assert pairs == int(written_out(layer, x)[1].sum()) * layer.dims.queries_per_key


def test_early_queries_read_no_compressed_key() -> None:
    """An empty softmax gives 0, not NaN: with the other gates closed, 0 until a key is complete."""
    layer, x = layer_of(NSAConfig(compress=4, stride=2, block=4, window=4), dims_of(9)), numbers(1, 9, 16)
    with torch.no_grad():
        layer.gate.weight.fill_(-1e4)
        layer.gate.weight[:HEADS] = 0
    x = x.detach().abs()
    y = feed(layer, x, causal=True)
    assert y.isfinite().all()
    assert not y[:, :3].any()
    assert y[:, 3:].any(-1).all()


def test_a_block_has_the_weights_of_the_strides_it_contains() -> None:
    """Equation 9 for l = 2d and b = 4d: 1, 2, 2, 2 and 1 times the weights of five compressed keys."""
    weights = numbers(1, 1, 12).detach()
    found = block_scores(weights, 3, Compression(8, 4, 16, 1, "cpu"))
    w = torch.cat(
        [torch.zeros(1), weights[0, 0], torch.zeros(4)]
    )  # none before the first, none after the last
    want = [w[4 * j] + 2 * (w[4 * j + 1] + w[4 * j + 2] + w[4 * j + 3]) + w[4 * j + 4] for j in range(3)]
    assert difference(found[0, 0], torch.stack(want)) <= EXACT


def test_all_blocks_selected_and_a_long_window_are_dense_twice() -> None:
    """Then both branches are dense attention, and differ by their gates alone."""
    layer, x = (
        layer_of(NSAConfig(compress=4, stride=4, block=4, blocks=9, window=40), dims_of(33)),
        numbers(2, 33, 16),
    )
    outputs = []
    for branch in (1, 2):
        with torch.no_grad():
            layer.gate.weight.fill_(-1e4)
            layer.gate.weight[branch * HEADS : (branch + 1) * HEADS] = 0
        outputs.append(feed(layer, x.detach().abs(), causal=True))
    assert difference(*outputs) <= EXACT


@torch.no_grad()
def test_decoding_reads_the_selected_blocks_and_the_window_alone() -> None:
    """Token by token, with a cache in which all other keys and values are NaN."""
    tokens = 37
    config = NSAConfig(compress=4, stride=2, block=4, blocks=4, window=3, group=2)
    layer = layer_of(config, dims_of(tokens, kv_heads=2)).eval()
    x = numbers(2, tokens, 16).detach()
    want, read = written_out(layer, x)
    clock = Clock()
    state = layer.init_state(2, tokens, clock=clock, dtype=torch.float64)
    for position in range(tokens):
        kept = state.keys.clone(), state.values.clone()
        needed = read[:, :, position].clone()
        needed[:, :, max(0, position - 3) :] = True  # the window, and the tokens that are compressed next
        for part in (state.keys, state.values):
            part.masked_fill_(~needed[..., None], torch.nan)
        y = layer.step(x[:, position : position + 1], state)
        assert difference(y, want[:, position : position + 1]) <= EXACT
        for part, before in zip((state.keys, state.values), kept, strict=True):
            part[:, :, :position] = before[:, :, :position]
        clock.advance(1)


@pytest.mark.parametrize("fault", ["an incomplete key", "a selection that looks ahead"])
def test_the_gate_sees_what_is_read_too_early(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed keys that are read before they are complete, or that only the selection sees."""
    dims = replace(dims_of(96, 2), d_model=32)
    config = NSAConfig(compress=4, stride=4, block=4, blocks=4, window=4)
    given = (dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert gates.leak(NSA, config, *given) <= gates.LEAK_TOLERANCE
    if fault == "an incomplete key":
        right = compressed_blocks._weights

        def early(rows: Tensor, k: Tensor, first: int, queries: int, sizes: Compression) -> Tensor:
            return right(rows, k, first + 1, queries, sizes)

        monkeypatch.setattr(compressed_blocks, "_weights", early)
    else:
        choose = compressed_blocks.choose

        def later(weights: Tensor, query: Tensor, last: int, nothing: int, sizes: Compression) -> Tensor:
            shuffled = weights.flip(1) if weights.shape[1] > 1 else weights
            return choose(shuffled, query, last, nothing, sizes)

        monkeypatch.setattr(compressed_blocks, "choose", later)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(NSA, config, *given)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"compress": 24}, "compress=24: allowed is a multiple of stride=16"),
        ({"compress": 128}, "compress=128: allowed is up to block=64"),
        ({"block": 72}, "block=72: allowed is a multiple of stride=16"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(knobs: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NSAConfig(**knobs)


def test_memory_grows_with_the_sequence_not_with_the_gathered_keys() -> None:
    """Twice the tokens need at most little more than twice the memory: the pieces of scores are bounded."""
    peaks = []
    for tokens in (2048, 4096):
        layer = NSA(NSAConfig(compress=16, stride=16, block=16, window=16), dims_of(tokens))
        x = torch.randn(1, tokens, 16, requires_grad=True)
        with LiveStorage() as storage:
            feed(layer, x, causal=True).sum().backward()
        peaks.append(storage.peak)
    assert peaks[1] <= 2.1 * peaks[0]
