"""DSA reads the tokens that its indexer prefers, and the auxiliary loss trains the indexer alone."""

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
from bench.measure.causality_gate import leak
from bench.measure.gate_failed import GateFailed
from variants.attention.dense import Dense, DenseConfig
from variants.attention.dsa import DSA, DSAConfig
from variants.base import Context, Workload
from variants.ops.chosen import chosen_keys
from variants.ops.tile_size import Sizes

SMALL: list[dict[str, Any]] = [
    {"top_k": 5, "index_heads": 2, "index_dim": 4},
    {"top_k": 16, "index_heads": 1, "index_dim": 8},
]


def dims_of(tokens: int, kv_heads: int | None = None) -> Workload:
    return Workload(causal=True, batch_size=1, seq_len=tokens, d_model=12, heads=3, kv_heads=kv_heads)


def layer_of(tokens: int, kv_heads: int | None = None, **knobs: int) -> DSA:
    config = DSAConfig(**{"index_heads": 2, "index_dim": 4, **knobs})
    layer = make_layer(DSA, config, dims_of(tokens, kv_heads))
    assert isinstance(layer, DSA)
    return layer


def written_out(layer: DSA, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and auxiliary loss, query by query."""
    dims, config = layer.dims, layer.config
    sizes = [dims.inner_dim, dims.key_dim, dims.key_dim]
    weights = layer.get_parameter("projections.qkv.weight").split(sizes)
    q, k, v = (einsum("btc,dc->btd", x, w).unflatten(-1, (-1, dims.head_dim)) for w in weights)
    q, k, v = rotated(q), *(t.repeat_interleave(dims.queries_per_key, dim=2) for t in (rotated(k), v))
    seen = x.detach()
    q_index = rotated(
        einsum("btc,dc->btd", seen, layer.index_q.weight).unflatten(-1, (config.index_heads, -1))
    )
    k_index = rotated(einsum("btc,dc->btd", seen, layer.index_k.weight)[:, :, None])[:, :, 0]
    w_index = einsum("btc,hc->bth", seen, layer.index_w.weight)
    rows, losses = [], []
    for b in range(len(x)):
        for t in range(x.shape[1]):
            products = einsum("hd,sd->hs", q_index[b, t], k_index[b, : t + 1]).clamp(min=0)
            index = (w_index[b, t] @ products) * (config.index_heads * config.index_dim) ** -0.5
            ranked = sorted((-score.item(), -s) for s, score in enumerate(index))  # the latest of equal ones
            read = [-s for _, s in ranked[: config.top_k]]
            scores = einsum("hd,shd->hs", q[b, t], k[b, read]) * dims.head_dim**-0.5
            shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
            rows.append(einsum("hs,shd->hd", shares, v[b, read]).flatten())
            target = shares.detach().mean(0)
            chosen = index[read].exp() / index[read].exp().sum()
            losses.append((target * (target.log() - chosen.log())).sum())
    y = torch.stack(rows).view(*x.shape[:2], -1)
    out = einsum("btc,dc->btd", y, layer.get_parameter("projections.out.weight"))
    return out, torch.stack(losses).mean()


@settings(deadline=None, max_examples=5)
@given(
    tokens=st.integers(1, 26),
    top_k=st.integers(1, 9),
    kv_heads=st.sampled_from([None, 1]),
    numbers_at_once=st.sampled_from([1, 500]),
)
@example(tokens=1, top_k=3, kv_heads=None, numbers_at_once=500)
@example(tokens=23, top_k=4, kv_heads=1, numbers_at_once=500)
@example(tokens=23, top_k=30, kv_heads=None, numbers_at_once=1)
def test_equals_the_equations_of_the_paper(
    tokens: int, top_k: int, kv_heads: int | None, numbers_at_once: int
) -> None:
    """Outputs and loss, and the gradients of their sum: with pieces of one query, of some and of all."""
    layer = layer_of(tokens, kv_heads, top_k=top_k)
    x = numbers(2, tokens, 12)

    def ours() -> Tensor:
        out = layer(x, Context(causal=True))
        assert out.aux_loss is not None
        return torch.cat([out.y.flatten(), out.aux_loss[None]])

    def theirs() -> Tensor:
        y, loss = written_out(layer, x)
        return torch.cat([y.flatten(), loss[None]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chosen_keys, "NUMBERS", Sizes(numbers_at_once, numbers_at_once))
        assert_same(ours, theirs, [x, *layer.parameters()])


def test_all_tokens_are_dense() -> None:
    layer = layer_of(43, top_k=43)
    dense = make_layer(Dense, DenseConfig(), dims_of(43))
    dense.load_state_dict({name: t for name, t in layer.state_dict().items() if "index" not in name})
    x = numbers(2, 43, 12)
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: feed(dense, x, causal=True),
        [x, *layer.projections.parameters()],
        [x, *dense.parameters()],
    )


def test_the_loss_trains_the_indexer_alone() -> None:
    layer, x = layer_of(30, top_k=6), numbers(2, 30, 12)
    out = layer(x, Context(causal=True))
    assert out.aux_loss is not None
    indexer = [*layer.auxiliary_parameters()]
    others = [x, *layer.projections.parameters()]
    of_loss = torch.autograd.grad(
        out.aux_loss, [*others, *indexer], retain_graph=True, materialize_grads=True
    )
    of_task = torch.autograd.grad(out.y.sum(), [*others, *indexer], materialize_grads=True)
    assert all(not grad.any() for grad in (*of_loss[: len(others)], *of_task[len(others) :]))
    assert all(grad.any() for grad in (*of_loss[len(others) :], *of_task[: len(others)]))
    with torch.no_grad():
        assert layer(x, Context(causal=True)).aux_loss is None


@torch.no_grad()
def test_evaluation_equals_training() -> None:
    layer, x = layer_of(30, top_k=6), numbers(1, 30, 12)
    with torch.enable_grad():
        y = layer(x, Context(causal=True)).y
    assert difference(layer(x, Context(causal=True)).y, y.detach()) <= EXACT


def test_the_gate_sees_a_choice_among_later_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic fault: later tokens take places in the choice, and are masked only in the attention."""
    dims = replace(dims_of(96), batch_size=2, d_model=24)
    config = DSAConfig(top_k=9, index_heads=2, index_dim=4)
    given = (dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert leak(DSA, config, *given) <= gates.LEAK_TOLERANCE

    def leaky(q: Tensor, k: Tensor, w: Tensor, count: int, device_type: str) -> Tensor:
        best = chosen_keys.index_scores(q, k, w).topk(min(count, q.shape[1])).indices
        token = torch.arange(q.shape[1])[:, None]
        return torch.where(best > token, best % (token + 1), best)  # a past token in place of a later one

    monkeypatch.setattr("variants.attention.dsa.choose", leaky)
    with pytest.raises(GateFailed, match="causality gate"):
        leak(DSA, config, *given)
