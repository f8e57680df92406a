"""Memorizing Transformer: exact nearest keys of earlier segments, whose keys and values are detached."""

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
from variants.attention.memorizing import Memorizing, MemorizingConfig
from variants.base import Workload
from variants.ops.chosen import nearest_keys

SMALL: list[dict[str, Any]] = [
    {"segment": 8, "memory": 20, "nearest": 4},
    {"segment": 9, "memory": 6, "nearest": 3},
]

HEADS = 2


def dims_of(tokens: int, batch: int = 1, kv_heads: int | None = None) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=HEADS, kv_heads=kv_heads)


def layer_of(config: MemorizingConfig, dims: Workload) -> Memorizing:
    """With different gates and factors for the heads."""
    layer = make_layer(Memorizing, config, dims)
    assert isinstance(layer, Memorizing)
    with torch.no_grad():
        layer.mix.copy_(numbers(HEADS, seed=5))
        layer.scale.add_(numbers(HEADS, seed=6))
    return layer


def segment_by_segment(layer: Memorizing, x: Tensor) -> Tensor:
    """Segments in order, each with the keys and values that earlier ones have left; query by query."""
    dims, config = layer.dims, layer.config
    widths = [dims.inner_dim, dims.key_dim, dims.key_dim]
    weights = layer.get_parameter("projections.qkv.weight").split(widths)
    q, k, v = (einsum("btc,dc->btd", x, w).unflatten(-1, (-1, dims.head_dim)) for w in weights)
    q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
    q_turned, k_turned = rotated(q), rotated(k)
    k, v, k_turned = (t.repeat_interleave(dims.queries_per_key, dim=2) for t in (k, v, k_turned))
    gate, rows = torch.sigmoid(layer.mix), []
    for b in range(len(x)):
        for h in range(dims.heads):
            keys, values = k[b, :0, h], v[b, :0, h]  # the memory
            for start in range(0, x.shape[1], config.segment):
                end = min(start + config.segment, x.shape[1])
                for t in range(start, end):
                    own = slice(start, t + 1)
                    scores = layer.scale[h] * (k_turned[b, own, h] @ q_turned[b, t, h])
                    y = (1 - gate[h]) * (scores.softmax(0) @ v[b, own, h])
                    if len(keys):
                        scores = layer.scale[h] * (keys @ q[b, t, h])
                        best = sorted(range(len(keys)), key=scores.tolist().__getitem__)[-config.nearest :]
                        y = y + gate[h] * (scores[best].softmax(0) @ values[best])
                    rows.append(y)
                keys = torch.cat([keys, k[b, start:end, h].detach()])[-config.memory :]
                values = torch.cat([values, v[b, start:end, h].detach()])[-config.memory :]
    y = torch.stack(rows).view(len(x), dims.heads, x.shape[1], -1).transpose(1, 2)
    return einsum("btc,dc->btd", y.flatten(2), layer.get_parameter("projections.out.weight"))


@settings(deadline=None, max_examples=8)
@given(
    tokens=st.integers(1, 30),
    segment=st.integers(1, 9),
    memory=st.integers(1, 20),
    nearest=st.integers(1, 6),
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([None, 1]),
)
@example(tokens=1, segment=4, memory=3, nearest=2, batch=1, kv_heads=None)
@example(tokens=8, segment=8, memory=3, nearest=2, batch=1, kv_heads=None)
@example(tokens=29, segment=4, memory=10, nearest=3, batch=2, kv_heads=1)
@example(tokens=30, segment=4, memory=3, nearest=5, batch=2, kv_heads=None)
def test_equals_segments_in_order(
    tokens: int, segment: int, memory: int, nearest: int, batch: int, kv_heads: int | None
) -> None:
    """Also in its gradients: nothing passes through the keys and values of the memory."""
    config = MemorizingConfig(segment=segment, memory=memory, nearest=nearest)
    layer = layer_of(config, dims_of(tokens, batch, kv_heads))
    x = numbers(batch, tokens, 12)
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: segment_by_segment(layer, x), [x, *layer.parameters()]
    )


@pytest.mark.parametrize("scores", [1, 100, 10**6])
def test_pieces_of_the_search_give_the_same(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One segment of one head at a time, several, or all."""
    layer, x = layer_of(MemorizingConfig(segment=4, memory=10, nearest=3), dims_of(31)), numbers(2, 31, 12)
    want = segment_by_segment(layer, x)
    monkeypatch.setattr(nearest_keys, "SCORES", nearest_keys.Sizes(cpu=scores, accelerator=scores))
    monkeypatch.setattr(nearest_keys, "MOST_PIECES", 1000)
    assert difference(feed(layer, x, causal=True), want) <= EXACT


def test_pairs_are_those_of_the_segments() -> None:
    for tokens, segment, memory, nearest in ((1, 4, 3, 2), (31, 4, 10, 3), (32, 4, 3, 5), (9, 9, 2, 1)):
        searched = read = 0
        for t in range(tokens):
            keys = min(memory, t // segment * segment)
            searched, read = searched + keys, read + min(nearest, keys)
        sizes = nearest_keys.Memory(segment, memory, nearest, "cpu")
        assert sizes.pairs(tokens) == (searched, read)


def test_the_gate_sees_a_memory_that_contains_the_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are added to the memory before the search in place of after it."""
    dims = replace(dims_of(96, 2), d_model=24)
    config = MemorizingConfig(segment=8, memory=16, nearest=4)
    given = (dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert gates.leak(Memorizing, config, *given) <= gates.LEAK_TOLERANCE
    right = nearest_keys.nearest_attention

    def early(q: Tensor, k: Tensor, v: Tensor, sizes: nearest_keys.Memory) -> Tensor:
        """Each segment searches one segment further."""
        later = (torch.cat([t[:, :, sizes.segment :], t[:, :, -sizes.segment :]], dim=2) for t in (k, v))
        return right(q, *later, sizes)

    monkeypatch.setattr("variants.attention.memorizing.nearest_attention", early)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Memorizing, config, *given)


def test_memory_grows_with_the_sequence_not_with_the_scores() -> None:
    """Twice the tokens need at most little more than twice the memory: the pieces of scores are bounded."""
    peaks = []
    for tokens in (4096, 8192):
        layer = Memorizing(MemorizingConfig(segment=16, memory=256, nearest=4), dims_of(tokens))
        x = torch.randn(1, tokens, 12, requires_grad=True)
        with LiveStorage() as storage:
            feed(layer, x, causal=True).sum().backward()
        peaks.append(storage.peak)
    assert peaks[1] <= 2.1 * peaks[0]
