"""Infini-attention: its memory is that of earlier segments, and equals linear attention over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import EXACT, assert_same, assert_same_layer, difference, feed, make_layer, numbers, rotated
from torch import Tensor, einsum

from bench.measure import gates
from variants.attention.dense import Dense, DenseConfig
from variants.attention.infini import Infini, InfiniConfig
from variants.base import Workload
from variants.ops.segments import segment_memory

SMALL: list[dict[str, Any]] = [
    {"segment": 8},
    {"segment": 7, "update": "delta"},
]

HEADS = 2


def dims_of(tokens: int, batch: int = 1, kv_heads: int | None = None) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=HEADS, kv_heads=kv_heads)


def layer_of(config: InfiniConfig, dims: Workload) -> Infini:
    """With different gates for the heads."""
    layer = make_layer(Infini, config, dims)
    assert isinstance(layer, Infini)
    with torch.no_grad():
        layer.mix.copy_(numbers(HEADS, seed=5))
    return layer


def phi(x: Tensor) -> Tensor:
    return torch.where(x < 0, x.exp(), x + 1)


def recall(query: Tensor, keys: Tensor, stored: list[Tensor]) -> Tensor:
    """Linear attention of one vector to the keys (t, D), and what they have written."""
    shares = phi(keys) @ phi(query)
    return shares @ torch.stack(stored) / shares.sum()


def token_by_token(layer: Infini, x: Tensor) -> Tensor:
    """Each query by itself: softmax over its segment; the linear memory as a sum over all keys of earlier
    segments, pair by pair, and the memory of the delta rule as a list of what every key has written."""
    dims, size = layer.dims, layer.config.segment
    widths = [dims.inner_dim, dims.key_dim, dims.key_dim]
    weights = layer.get_parameter("projections.qkv.weight").split(widths)
    q, k, v = (einsum("btc,dc->btd", x, w).unflatten(-1, (-1, dims.head_dim)) for w in weights)
    q_turned, k_turned = rotated(q), rotated(k)
    k, v, k_turned = (t.repeat_interleave(dims.queries_per_key, dim=2) for t in (k, v, k_turned))
    gate = torch.sigmoid(layer.mix)
    rows = []
    for b in range(len(x)):
        for h in range(dims.heads):
            stored: list[Tensor] = []
            """What each key of a finished segment has written."""
            for start in range(0, x.shape[1], size):
                end = min(start + size, x.shape[1])

                past = k[b, :start, h]
                for t in range(start, end):
                    scores = k_turned[b, start : t + 1, h] @ q_turned[b, t, h] * dims.head_dim**-0.5
                    y = (1 - gate[h]) * (scores.softmax(0) @ v[b, start : t + 1, h])
                    rows.append(y + gate[h] * recall(q[b, t, h], past, stored) if start else y)
                new = list(v[b, start:end, h])
                if start and layer.config.update == "delta":
                    known = [*stored]
                    new = [value - recall(k[b, start + i, h], past, known) for i, value in enumerate(new)]
                stored += new
    y = torch.stack(rows).view(len(x), dims.heads, x.shape[1], -1).transpose(1, 2)
    return einsum("btc,dc->btd", y.flatten(2), layer.get_parameter("projections.out.weight"))


@settings(deadline=None, max_examples=8)
@given(
    tokens=st.integers(1, 30),
    segment=st.integers(1, 9),
    update=st.sampled_from(["linear", "delta"]),
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([None, 1]),
)
@example(tokens=1, segment=4, update="linear", batch=1, kv_heads=None)
@example(tokens=8, segment=8, update="delta", batch=1, kv_heads=None)
@example(tokens=9, segment=8, update="delta", batch=1, kv_heads=1)
@example(tokens=30, segment=4, update="linear", batch=2, kv_heads=1)
@example(tokens=29, segment=4, update="delta", batch=2, kv_heads=None)
def test_equals_the_sums_written_out(
    tokens: int, segment: int, update: Any, batch: int, kv_heads: int | None
) -> None:
    layer = layer_of(InfiniConfig(segment=segment, update=update), dims_of(tokens, batch, kv_heads))
    x = numbers(batch, tokens, 12)
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: token_by_token(layer, x), [x, *layer.parameters()]
    )


def test_one_segment_is_dense_attention_times_its_gate() -> None:
    """β = −∞ leaves the local part alone."""
    layer = layer_of(InfiniConfig(segment=50), dims_of(43))
    with torch.no_grad():
        layer.mix.fill_(-1e4)
    dense = make_layer(Dense, DenseConfig(), dims_of(43), seed=1)
    dense.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "mix"})
    x = numbers(2, 43, 12).detach()
    assert difference(feed(layer, x, causal=True), feed(dense, x, causal=True)) <= EXACT


def test_an_open_gate_reads_the_past_alone() -> None:
    """β = ∞: the outputs do not depend on the tokens of the own segment but by their queries."""
    layer = layer_of(InfiniConfig(segment=4), dims_of(12))
    with torch.no_grad():
        layer.mix.fill_(1e4)
    x = numbers(1, 12, 12).detach()
    other = x.clone()
    other[:, 8:11] += 1
    y, moved = (feed(layer, each, causal=True) for each in (x, other))
    assert difference(moved[:, 11], y[:, 11]) <= EXACT
    assert difference(moved[:, 10], y[:, 10]) > 1e-3


def test_the_delta_rule_does_not_write_what_is_known() -> None:
    """A second segment that repeats the only key and value of the first leaves the matrix as it is."""
    k = numbers(1, 1, 1, 6).detach().expand(1, 2, 3, 6).contiguous()
    v = numbers(1, 1, 1, 6, seed=2).detach().expand(1, 2, 3, 6).contiguous()
    sums, norms = segment_memory.written(k, v)
    before = norms.cumsum(1)
    factors = torch.cat(
        [torch.zeros(1, 1, 6, 6, dtype=k.dtype), segment_memory.transitions(k[:, 1:], before[:, :-1])], dim=1
    )
    memories = segment_memory.scanned(factors, sums)
    assert difference(segment_memory.read(k[:, 0], memories[:, 0], before[:, 0]), v[:, 0]) <= EXACT
    assert difference(memories[:, 1], memories[:, 0]) <= EXACT


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_a_scan_is_the_loop(count: int) -> None:
    factors, terms = numbers(2, count, 4, 4), numbers(2, count, 4, 4, seed=2)
    memory, want = torch.zeros(2, 4, 4, dtype=torch.float64), []
    for i in range(count):
        memory = factors[:, i] @ memory + terms[:, i] if i else terms[:, 0]
        want.append(memory)
    assert_same(
        lambda: segment_memory.scanned(factors, terms), lambda: torch.stack(want, 1), [factors, terms]
    )


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_the_gate_sees_a_memory_that_is_read_after_its_update(update: Any) -> None:
    """A segment that reads itself from the memory reads its later tokens."""

    class ReadsAfterUpdate(Infini):
        def _mixed(self, local: Tensor, q: Tensor, memory: Any, first: int) -> Tensor:
            if memory is not None:  # each segment finds that of the next
                memory = tuple(torch.cat([t[:, 1:], t[:, -1:]], dim=1) for t in memory)
            return super()._mixed(local, q, memory, first)

    dims, config = replace(dims_of(96, 2), d_model=24), InfiniConfig(segment=8, update=update)
    given = (dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert gates.leak(Infini, config, *given) <= gates.LEAK_TOLERANCE
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(ReadsAfterUpdate, config, *given)


def test_layers_with_and_without_a_longer_segment_differ_by_the_memory_alone() -> None:
    """A segment as long as the sequence has no memory: the same as any longer one."""
    x = numbers(1, 20, 12)
    one, other = (layer_of(InfiniConfig(segment=s), dims_of(20)) for s in (20, 99))
    assert_same_layer(one, other, x, causal=True)
