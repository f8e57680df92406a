"""MoBA reads what its paper says, block by block, and nothing that a later token decides."""

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
from bench.measure.memory import LiveStorage
from variants.attention.dense import Dense, DenseConfig
from variants.attention.moba import MoBA, MoBAConfig
from variants.base import Clock, Context, Workload
from variants.ops.chosen import block_means
from variants.ops.chosen.block_layout import Plan, lay_out, tiles_of
from variants.ops.chosen.routed_blocks import routed_attention

SMALL: list[dict[str, Any]] = [
    {"block": 4, "top_k": 3},
    {"block": 8, "top_k": 2, "impl": "plain"},
]

HEADS = 3


def dims_of(tokens: int, batch: int = 1, kv_heads: int | None = None) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=HEADS, kv_heads=kv_heads)


def read_by_each(q: Tensor, k: Tensor, block: int, top_k: int) -> Tensor:
    """(B, H, T, T) bool: the paper's selection for each query, with queries and keys (B, T, H, D)."""
    batch, tokens, heads, _ = q.shape
    q, k = q.detach(), k.detach()
    allowed = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                own = t // block
                gate = [float(q[b, t, h] @ k[b, i * block : (i + 1) * block, h].mean(0)) for i in range(own)]
                best = sorted(range(own), key=lambda i: -gate[i])[: top_k - 1]
                for i in best:
                    allowed[b, h, t, i * block : (i + 1) * block] = True
                allowed[b, h, t, own * block : t + 1] = True
    return allowed


def written_out(layer: MoBA, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs from the mask of `read_by_each`, and the mask."""
    dims = layer.dims
    sizes = [dims.inner_dim, dims.key_dim, dims.key_dim]
    weights = layer.get_parameter("projections.qkv.weight").split(sizes)
    q, k, v = (einsum("btc,dc->btd", x, w).unflatten(-1, (-1, dims.head_dim)) for w in weights)
    q, k = rotated(q), rotated(k)
    k, v = (t.repeat_interleave(dims.heads // dims.key_heads, dim=2) for t in (k, v))
    allowed = read_by_each(q, k, layer.config.block, layer.config.top_k)
    scores = einsum("bihd,bjhd->bhij", q, k) * dims.head_dim**-0.5
    weights_of_keys = (scores - scores.amax(-1, keepdim=True).detach()).exp() * allowed
    y = einsum("bhij,bjhd->bihd", weights_of_keys / weights_of_keys.sum(-1, keepdim=True), v)
    return einsum("btc,dc->btd", y.flatten(2), layer.get_parameter("projections.out.weight")), allowed


@settings(deadline=None, max_examples=12)
@given(
    tokens=st.integers(1, 45),
    block=st.integers(1, 9),
    top_k=st.integers(1, 5),
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([None, 1]),
    impl=st.sampled_from(["fused", "plain"]),
)
@example(tokens=1, block=4, top_k=3, batch=1, kv_heads=None, impl="fused")
@example(tokens=40, block=4, top_k=3, batch=2, kv_heads=1, impl="fused")
@example(tokens=41, block=4, top_k=5, batch=1, kv_heads=None, impl="plain")
@example(tokens=9, block=9, top_k=3, batch=1, kv_heads=None, impl="fused")
@example(tokens=20, block=1, top_k=3, batch=1, kv_heads=None, impl="fused")
def test_equals_the_equations_of_the_paper(
    tokens: int, block: int, top_k: int, batch: int, kv_heads: int | None, impl: Any
) -> None:
    dims = dims_of(tokens, batch, kv_heads)
    layer = make_layer(MoBA, MoBAConfig(block=block, top_k=top_k, impl=impl), dims)
    assert isinstance(layer, MoBA)
    x = numbers(batch, tokens, 12)
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: written_out(layer, x)[0], [x, *layer.parameters()]
    )
    allowed = written_out(layer, x)[1]
    assert layer.cost(dims).parts["attention"] == 4 * 4 * int(allowed.sum())
    past = sum(t // block for t in range(tokens)) if top_k > 1 else 0
    assert layer.cost(dims).parts["gate"] == 2 * 4 * HEADS * batch * past


def test_enough_blocks_are_dense() -> None:
    layer = make_layer(MoBA, MoBAConfig(block=8, top_k=6), dims_of(43))
    assert_same_layer(
        layer, make_layer(Dense, DenseConfig(), dims_of(43), seed=1), numbers(2, 43, 12), causal=True
    )


def test_one_block_is_local() -> None:
    """With top_k = 1, each block is a sequence of its own."""
    layer = make_layer(MoBA, MoBAConfig(block=8, top_k=1), dims_of(43))
    x = numbers(1, 43, 12).detach()
    positions = torch.arange(43)
    pieces = [
        layer(x[:, i : i + 8], Context(causal=True, positions=positions[i : i + 8])).y
        for i in range(0, 43, 8)
    ]
    assert difference(feed(layer, x, causal=True), torch.cat(pieces, dim=1)) <= EXACT


@pytest.mark.parametrize("tokens", [64, 61])
def test_each_pair_has_one_slot_whatever_is_selected(tokens: int) -> None:
    """Also if all queries select one block, which then has as many tiles as needed."""
    block, starts = 4, (4, 8)
    plan = Plan(block, starts, "plain", "cpu")
    size, number = tiles_of(tokens, plan)
    drawn = torch.stack(
        [torch.randint(t // block, (2,)) if t >= block else torch.tensor([0, 0]) for t in range(tokens)]
    )
    drawn[:, 1] = (drawn[:, 0] + 1) % (torch.arange(tokens) // block).clamp(min=1)
    first = torch.zeros(tokens, 2, dtype=torch.int64)
    first[:, 1] = 1
    picks = torch.stack([drawn, first])
    layout = lay_out(picks, plan)
    for sequence in range(2):
        for t in range(tokens):
            for j, start in enumerate(starts):
                slot = int(layout.slot[sequence, t, j])
                if t < start:
                    assert slot == size * number
                    continue
                assert layout.query[sequence, slot] == t
                assert layout.block[sequence, slot // size] == picks[sequence, t, j]
        assert int((layout.query[sequence] >= 0).sum()) == plan.pairs(tokens)


@pytest.mark.parametrize("impl", ["fused", "plain"])
def test_heads_that_share_a_selection_are_those_with_repeated_keys(impl: str) -> None:
    """Two query heads for each head of keys: the same as keys, values and picks for every head."""
    q, k, v = numbers(2, 4, 45, 6), numbers(2, 2, 45, 6, seed=2), numbers(2, 2, 45, 6, seed=3)
    picks = block_means.best_blocks(q[:, ::2], block_means.block_means(k, 5), 5, 3, "cpu")
    plan = Plan(5, (5, 10, 15), impl, "cpu")
    several = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    assert_same(
        lambda: routed_attention(q, k, v, picks, plan),
        lambda: routed_attention(q, *several, picks.repeat_interleave(2, dim=1), plan),
        [q, k, v],
    )


@torch.no_grad()
def test_decoding_reads_the_selected_blocks_alone() -> None:
    """Token by token, with a cache in which all other keys and values are NaN."""
    tokens = 37
    layer = make_layer(MoBA, MoBAConfig(block=4, top_k=3), dims_of(tokens, kv_heads=1)).eval()
    assert isinstance(layer, MoBA)
    x = numbers(2, tokens, 12).detach()
    want, read = written_out(layer, x)
    clock = Clock()
    state = layer.init_state(2, tokens, clock=clock, dtype=torch.float64)
    for position in range(tokens):
        kept = state.keys.clone(), state.values.clone()
        unread = ~read[:, :, position].any(1)[:, None, :, None]  # (B, 1, T, 1)
        if (position + 1) % 4:  # a block that ends is averaged
            for part in (state.keys, state.values):
                part.masked_fill_(unread, torch.nan)
        y = layer.step(x[:, position : position + 1], state)
        assert difference(y, want[:, position : position + 1]) <= EXACT
        for part, before in zip((state.keys, state.values), kept, strict=True):
            part[:, :, :position] = before[:, :, :position]
        clock.advance(1)


@pytest.mark.parametrize("ahead", [1, 100])
def test_the_gate_sees_means_of_own_and_later_blocks(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic fault: such blocks take part in the selection, and are masked only in the attention."""
    dims, config = replace(dims_of(96, 2), d_model=24), MoBAConfig(block=4, top_k=2)
    given = (dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert gates.leak(MoBA, config, *given) <= gates.LEAK_TOLERANCE

    def leaky(q: Tensor, means: Tensor, block: int, count: int, device_type: str, **_: int) -> Tensor:
        own = torch.arange(q.shape[2])[:, None] // block
        there = torch.arange(means.shape[2]) < own + ahead
        scores = (q @ means.mT).masked_fill(~there, float("-inf"))
        best = scores.topk(count).indices
        return torch.minimum(best, (own - 1).clamp(min=0))  # a past block is read in place of a later one

    monkeypatch.setattr("variants.attention.moba.best_blocks", leaky)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(MoBA, config, *given)


def test_memory_grows_with_the_sequence_not_with_the_gathered_keys() -> None:
    """Twice the tokens need at most twice the memory."""
    peaks = []
    for tokens in (2048, 4096):
        layer = MoBA(MoBAConfig(block=16), dims_of(tokens))
        x = torch.randn(1, tokens, 12, requires_grad=True)
        with LiveStorage() as storage:
            feed(layer, x, causal=True).sum().backward()
        peaks.append(storage.peak)
    assert peaks[1] <= 2.1 * peaks[0]
